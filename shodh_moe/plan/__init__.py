"""Predict how long a training step takes on a machine, and choose the layout of the ranks."""
