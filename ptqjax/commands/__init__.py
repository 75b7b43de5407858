"""Holds the command line: one file a command, and one for each group of options that commands share."""
