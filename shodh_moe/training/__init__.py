"""Train under DeepSpeed: engine, optimizer, telemetry, resuming and the training loop."""
