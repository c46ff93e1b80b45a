"""Tasks and metrics, adapter against base with intervals."""
