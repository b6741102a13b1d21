"""The demo world: a small bilingual source of text with exact probabilities, and tasks about it."""
