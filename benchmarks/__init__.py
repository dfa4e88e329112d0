"""Benchmarks: each a script that prints a table and, with --json FILE, its raw figures.

`python -m benchmarks` runs all of them in turn; `python -m benchmarks.NAME --help` tells one's options.
A claim is a ratio against something run beside it in the same run, medians of several runs.
"""
