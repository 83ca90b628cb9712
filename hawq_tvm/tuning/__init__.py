"""Measured tiles: raced here, on other machines, or exported for a GPU that is elsewhere."""
