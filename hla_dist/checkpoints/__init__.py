"""Checkpoints: written whole or not at all, verified on loading, exported as safetensors."""
