"""Merge checkpoints offline with CCM along a physical axis, or with common methods (DESIGN 3.7).

`merge` writes the outputs of one config file. Tensors are streamed in slices, so models of any size fit into a fixed
amount of memory.
"""

from shodh_moe.merging.merge import merge

__all__ = ["merge"]
