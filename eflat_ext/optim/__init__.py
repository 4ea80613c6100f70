"""Optimizers that train LoRA factors at the perturbed point, and their factories."""
