"""Fine-tune one model by several methods on equal terms."""
