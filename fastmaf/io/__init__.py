"""Reading and writing files: models, atomic writes, locks, JSON from untrusted files."""
