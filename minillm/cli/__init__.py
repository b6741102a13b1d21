"""The command line: how flags are parsed, and the arguments of every program."""
