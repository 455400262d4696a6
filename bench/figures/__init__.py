"""The kinds of figures, and the page that they share; ``fastmaf.bench.plot`` draws them all."""
