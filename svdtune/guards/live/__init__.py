"""Guards that need the built run: its networks, its batch, its step."""
