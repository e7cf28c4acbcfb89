"""References of the quantized dense matmuls."""
