"""Measurements, one question a module: `python -m benchmarks NAME`, and `python -m benchmarks` lists the names.

A benchmark is a module with a docstring, whose first line is its question, and `run(quick, **options)`, which prints
a table of ratios within one run and returns what it measured. results/ holds the last full run of each.
"""
