"""What the user asks, typed and frozen."""
