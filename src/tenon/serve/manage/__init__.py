"""The management API, on a port of its own with keys of its own."""
