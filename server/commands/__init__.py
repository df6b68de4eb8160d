"""The commands of the command line, each an ordinary function."""
