"""Inspection: fit on good images, find defects and where they are, at a false-alarm rate that is promised."""
