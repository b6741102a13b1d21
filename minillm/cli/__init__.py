"""The command line: what flags mean, and every program's arguments."""
