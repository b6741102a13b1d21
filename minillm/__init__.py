"""minillm: a large language model from scratch, in code a person can read in a weekend and run for real."""

__version__ = "0.1.0"
