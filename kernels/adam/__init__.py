"""One step of Adam on one tensor."""
