"""Which layer gets how many bits: sensitivities, latencies, budgets, the integer programme."""
