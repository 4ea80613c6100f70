"""Measure eflat_ext: kernels, training steps, methods; experiments and their report."""
