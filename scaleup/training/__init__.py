"""One training loop for every method and backbone."""
