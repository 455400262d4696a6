"""Files: written so that a crash leaves the old content or the new, and locked against a second writer."""
