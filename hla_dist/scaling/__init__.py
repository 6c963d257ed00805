"""How time, traffic and memory of an operator, and of a training step, grow with ranks and tokens."""
