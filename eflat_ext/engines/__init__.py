"""Attach a perturbation to an engine that owns gradients and steps."""
