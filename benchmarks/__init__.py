"""Benchmarks: `python -m benchmarks.NAME` measures ours and every peer in one run and writes `results/NAME.json`."""
