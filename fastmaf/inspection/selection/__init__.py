"""Selecting the score and the anomaly map without a defective image."""
