"""The command line of scaleup."""
