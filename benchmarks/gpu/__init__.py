"""The suite for a GPU: what is launched is compiled, checked, timed beside peers and reported."""
