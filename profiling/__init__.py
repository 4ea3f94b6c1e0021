"""Benchmark programs, run from a checkout: `python -m profiling.bench_logprobs`. Not part of the installed package."""
