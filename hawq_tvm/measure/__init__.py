"""Times of one thing: kernels in turns, the machine's limits, pinned threads, a package's profile."""
