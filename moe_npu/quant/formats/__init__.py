"""The on-disk formats of quantized checkpoints, one file each."""
