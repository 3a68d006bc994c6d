"""Benchmarks live here, run by `python -m recipes.benchmarks`; README.md says what is in which file. This file stays empty."""
