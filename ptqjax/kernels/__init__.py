"""Array mathematics: no names, no graphs, no files."""
