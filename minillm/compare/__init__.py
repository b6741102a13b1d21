"""Runs next to each other: their curves, their results and the settings in which they differ."""
