"""Integer operators as tensor expressions (TE)."""
