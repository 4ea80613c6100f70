"""Benchmarks of the kernels: time, error, and lower bounds of the time."""
