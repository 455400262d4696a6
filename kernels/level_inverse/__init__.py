"""Exact level-scheduled inverse of an affine autoregressive block."""
