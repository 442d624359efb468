"""What could go wrong, found before it does. Imported by the command line only; the trainer runs without it."""
