"""The Triton kernels, imported as ``hla_kernels``: torch and Triton only, no autograd, no collectives.

    first_order   the kernel every operator is made of: one causal pass, either way, with its carry
    segments      what happens between the segments of one device's sequence
    cascade       an operator as a list of passes, turned into launches
    stages        outputs from a carry, gradients from a reverse carry, summaries
    sequences     how kernels address tensors
    tiles         the tile table
    device        where kernels run, and what is refused there

``hla_dist/functional/triton_stages.py`` puts them behind ``backend="triton"``. See docs/kernels.md.
"""
