"""Affine autoregressive blocks in a row, forward and inverse, in one call."""
