"""Measurements against the published way of computing a step; `python benchmarks/run.py --help` is the door."""
