"""Exchanges on ranks that are not at hand: the library's own messages on a simulated network (README.md)."""
