"""Visual inspection: fitted to good images, finds and locates defects at a guaranteed false-alarm rate."""
