"""Rehearse a run on GPUs that are not there: one rank, on fake CUDA tensors and with a fake process group."""
