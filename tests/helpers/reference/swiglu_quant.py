"""References of SwiGLU with quantization."""
