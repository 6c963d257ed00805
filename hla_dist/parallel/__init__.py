"""Who owns which tokens, and everything that travels between ranks."""
