"""Tokenised documents on disk, made once, by one process or by several at a time."""
