"""A run on disk: folder layout, append-only events, checkpoints, results, trackers."""
