"""State to disk and back, and the export that other programs open."""
