"""Float networks in torch, from ONNX files and exported programs, and the data they are calibrated with."""
