"""Public operators: one call checked once, backend, autograd. ``hla_dist`` itself exports what users call."""
