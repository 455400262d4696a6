"""What the inspection commands do, one module per command."""
