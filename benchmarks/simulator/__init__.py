"""Exchanges on ranks that are not at hand: a simulated network, and what it predicts."""
