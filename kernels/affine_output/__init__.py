"""Output layer of a MADE, fused with the affine transform that it parametrises."""
