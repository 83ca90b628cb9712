"""Comparisons on a machine with a GPU: the bundle that is carried there and what it measures."""
