"""Data: text and tokens from files, cut into windows and shared out to ranks."""
