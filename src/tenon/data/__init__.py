"""Sources to rendered chat with a loss mask, to packed, seeded, resumable batches."""
