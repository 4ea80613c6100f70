"""Measure the models that runs have saved."""
