"""Tokens to text as they come: detokenised, cut at stops, and read for calls of functions."""
