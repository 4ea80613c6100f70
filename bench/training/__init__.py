"""Time optimizer steps and whole training steps."""
