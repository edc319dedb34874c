"""Benchmarks: suites that measure a method against the best baseline in the same run."""
