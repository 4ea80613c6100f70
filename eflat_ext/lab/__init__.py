"""The command ``eflat``: fine-tune, compare methods, measure what was trained."""
