"""Read, check and split labelled text and settings."""
