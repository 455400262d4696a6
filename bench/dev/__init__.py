"""Tools for developers: ``python -m fastmaf.bench.dev.<name>`` in a checkout. They are not part of the wheel."""
