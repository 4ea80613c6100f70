"""Experiments: grids in YAML, and scripts that measure what no grid does."""
