"""Evaluate a model on held-out trajectories."""
