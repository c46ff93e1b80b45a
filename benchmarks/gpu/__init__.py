"""What the GPU benchmarks share: the works, processes with a time budget, records that add up over calls, tables."""
