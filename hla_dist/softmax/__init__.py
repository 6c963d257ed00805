"""Exact softmax attention over a sharded sequence: the operator and its exchange of keys and values."""
