"""Linear layer whose mask is a prefix matrix, optionally with its activation."""
