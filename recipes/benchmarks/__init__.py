"""Benchmarks live here, run by `python -m recipes.benchmarks`; README.md says what is where. This file stays empty."""
