"""Images: finding, decoding and resizing image files, and writing pictures."""
