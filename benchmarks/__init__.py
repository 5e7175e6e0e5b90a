"""Benchmarks of ringattn: ``python -m benchmarks [NAME ...]``. Every answer is checked before it is timed."""
