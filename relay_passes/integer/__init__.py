"""How each float operator between dequantize and quantize becomes integer operators (pass lower_to_integer)."""
