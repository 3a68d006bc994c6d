"""Networks whose code cannot be followed: each stage runs the network's own code, with its own layers only."""
