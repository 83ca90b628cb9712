"""From a float network to bits per layer: its graph in torch, calibration data, sensitivities, latencies, and the choice under budgets."""
