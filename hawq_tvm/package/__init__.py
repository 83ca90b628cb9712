"""A compiled model, with the compiler and without it: load, run, verify, save."""
