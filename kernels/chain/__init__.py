"""Several affine autoregressive blocks in a row, from data to base, in one call."""
