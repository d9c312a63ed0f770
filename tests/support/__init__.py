"""Helpers of the tests: fake caches and models, faults of disks and stores, float64 references."""
