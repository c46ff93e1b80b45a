"""What is told of requests: records, metrics, a log, traces. It decides nothing."""
