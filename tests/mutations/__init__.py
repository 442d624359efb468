"""Broken cases written without knowledge of the checks, and sound ones beside them."""
