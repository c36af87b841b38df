"""Measurements on held-out trajectories, and the report that shows them."""
