"""Merge checkpoints offline, with CCM along a physical axis or with common methods (DESIGN 3.7; docs/merging.md).

`merge` writes the outputs of one config file. Inputs and outputs are streamed in slices of tensors, so models of any
size fit into a fixed amount of memory.
"""

from shodh_moe.merging.merge import merge

__all__ = ["merge"]
