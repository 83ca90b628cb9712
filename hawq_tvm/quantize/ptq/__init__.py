"""Post-training quantization: observers, rounding, reconstruction, equalization, and the QDQ file that results."""
