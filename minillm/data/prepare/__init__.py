"""Prepares data files for training: clean, deduplicate, mix, split (``python -m minillm.data.prepare``)."""
