"""Caches out of caches and tables: subset, merge, export and importing."""
