"""Tokenised documents on disk: made once, also when several processes start at the same time."""
