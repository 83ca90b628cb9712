"""NVIDIA GPUs: targets, nvcc without a driver, and what a machine that runs a package must have."""
