"""Training: data, optimiser, loop, checkpoints, metrics, generation and the parity check."""
