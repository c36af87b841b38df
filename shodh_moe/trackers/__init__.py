"""Trackers: send the records of training to TensorBoard, a CSV file, MLflow or W&B (docs/trackers.md).

`scalars` turns a record into named numbers and `load_maps` into pictures; each tracker has its own file. `sender` feeds
records to a tracker, and `follower` does so in a process of its own, from the run's metrics.jsonl.
"""
