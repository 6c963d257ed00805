"""The Triton kernels, imported as ``hla_kernels``: torch and Triton only, no autograd, no collectives.

    first_order   the kernel every operator is made of: one causal pass, either way, with its carry
    channels      first order with a gate per channel; its kernels are in channel_passes
    fused         a whole cascade in one walk, where the registers allow it
    walk, walks   two passes at once by specialised warps, and whole cascades by them: Hopper, bf16, backend="gluon"
    decode        a single token: states read once and written once
    segments      what happens between the segments of one device's sequence
    cascade       an operator as a list of passes, turned into launches
    stages        outputs from a carry, gradients from a reverse carry, summaries
    slices        a large backward in parts of the batch or the heads
    sequences     how kernels address tensors
    tiles         the tile table
    device        where kernels run, and what is refused there
    tune          ``python -m hla_kernels.tune``: candidate tiles timed on the GPU at hand
    report, aot   ``python -m hla_kernels.report``: what every kernel takes on every architecture, without a GPU

``hla_dist/functional/triton_stages.py`` puts them behind ``backend="triton"``, ``gluon_stages.py`` the walks behind
``backend="gluon"``. See docs/kernels.md.
"""
