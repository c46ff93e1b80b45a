"""Tenon: a self-hosted LoRA works. Data set in, served adapter out."""

__version__ = "0.1.0"
