"""How good a quantized network is: accuracy, and simulated quantization beside the integers that run."""
