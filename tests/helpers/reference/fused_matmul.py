"""References of the grouped matmuls fused with what follows them."""
