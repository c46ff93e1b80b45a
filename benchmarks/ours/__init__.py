"""Tenon as the benchmarks run it: each measurement is a process of its own."""
