"""What runs: all input and output of a node."""
