"""Decoders in plain torch: loading and the forward pass over packed tokens."""
