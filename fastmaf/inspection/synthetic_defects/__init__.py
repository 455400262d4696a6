"""Synthetic defects drawn onto good images."""
