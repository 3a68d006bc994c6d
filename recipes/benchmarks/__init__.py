"""Benchmarks live here, one file per claim, run by `python -m recipes.benchmarks.NAME`; this file stays empty."""
