"""What is proved about a compiled model: an independent reference, exact comparison, the integer-only certificate."""
