"""Processes: how ranks meet, what mesh they form, and how they stop or fail together."""
