"""One fused operation a file: the formula, a plain torch reference, the fast path, its backward."""
