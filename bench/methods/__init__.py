"""Rivals and variants, for ``bench.experiment``."""
