"""Merging checkpoints offline: CCM along a physical axis, and the common methods beside it (DESIGN 3.7).

`merge` makes the outputs of one config file. Inputs and outputs are streamed in slices of tensors, so models of any
size fit into a fixed amount of memory.
"""

from shodh_moe.merging.merge import merge

__all__ = ["merge"]
