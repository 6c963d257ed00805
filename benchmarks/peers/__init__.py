"""Other ways to share one sequence between ranks, written from their papers, to be measured beside this library's.

    lasp.py               first order: LASP-1, states around a ring; LASP-2, states gathered
    ring_attention.py     softmax: keys and values around a ring
    head_all_to_all.py    every rank the whole sequence for some heads: Ulysses (softmax), Megatron's way for hla2

All take ``q, k [B, T, H, K]``, ``v [B, T, H, V]`` and a group, give this rank's ``out [B, T, H, V]``, and are
differentiable. What a rank works on alone is the same code for all (this library's operators, torch's fused softmax
attention): they differ in what travels. Shards are equal, and nobody checks that they are: none of these systems does.
"""
