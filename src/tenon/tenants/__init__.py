"""Who may ask what, and how much of it: keys, limits, usage. Knows no HTTP and no tensors."""
