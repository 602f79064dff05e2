"""Benchmarks: one file an op, against the strongest rivals, checked against float64 before they are timed."""
