"""Rules for NVIDIA GPUs."""
