"""Reading and writing files: checkpoints, atomic replacement, JSON from strangers."""
