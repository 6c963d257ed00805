"""Public operators: validation, the choice of a backend, autograd."""
