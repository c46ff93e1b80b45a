"""Figures with bounds: each script here measures one claim and writes benchmarks/results/NAME.json."""
