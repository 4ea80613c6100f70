"""Experiments: grids of runs in YAML files, and scripts for other measurements."""
