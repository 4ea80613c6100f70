"""Implement the command ``eflat``: fine-tune, compare methods, measure trained models."""
