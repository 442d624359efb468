"""Checkpoints from one format into another, every result read back."""
