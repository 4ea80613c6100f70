"""Methods that ``bench.experiment`` compares EFlat-LoRA with."""
