"""Benchmarks of kernels, training steps and methods; experiments and their report."""
