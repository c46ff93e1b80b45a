"""Tokens in, tokens out, many adapters in a batch; knows no text and no HTTP."""
