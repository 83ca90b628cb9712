"""Names and features of CPUs and GPUs; no compiler is called here."""
