"""Benchmarks of optimizer steps and whole training steps."""
