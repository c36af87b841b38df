"""Runs from start to end: the stages of the main job, checks, plans, the run folder, and the programs of ranks."""
