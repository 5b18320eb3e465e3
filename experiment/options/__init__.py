"""The options of a run: their defaults, ranges and help; the command line; recipes."""
