"""``python -m fastmaf`` is the ``fastmaf`` command."""

from fastmaf.cli import main

main()
