"""Inspection on feature maps: of EfficientNet-Lite0, or of any torch module."""
