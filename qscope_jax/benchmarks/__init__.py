"""Benchmarks as functions: each measures ratios within one run and returns plain figures. Called by `qscope bench`."""
