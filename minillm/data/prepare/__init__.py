"""Prepares data files for training: clean, deduplicate, decontaminate, mix, split (``python -m minillm.data.prepare``)."""
