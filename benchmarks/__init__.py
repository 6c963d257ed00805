"""Programs that measure; their reports are in ``results/``."""
