"""Image files: finding, decoding and resizing them, and writing PNGs."""
