"""Benchmarks: correctness first, then times beside the limits of the machine they ran on."""
