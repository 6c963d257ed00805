"""Home of the Triton kernels, imported as ``hla_kernels``: torch and Triton only, no autograd, no collectives.

There are none in this version: every operator runs on the torch backend, and ``backend="triton"`` raises. The
stages that kernels will implement are listed in docs/development.md.
"""
