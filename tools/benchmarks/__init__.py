"""Measurements for developers, run by `python -m tools.benchmarks.NAME`."""
