"""Pretraining under DeepSpeed: sampler, engine, telemetry, checkpoints and the training script itself."""
