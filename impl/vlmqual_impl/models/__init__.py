"""One module for each family, told from top to bottom in the order of the data."""
