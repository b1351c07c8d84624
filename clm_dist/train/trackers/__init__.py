"""A run's metrics to the trackers of its job, each in a process of its own that reads metrics.jsonl."""
