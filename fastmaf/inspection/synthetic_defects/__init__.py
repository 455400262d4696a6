"""Synthetic defects drawn onto normal images."""
