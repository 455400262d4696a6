"""Selecting augmentation, blocks, score and anomaly map without a defective image."""
