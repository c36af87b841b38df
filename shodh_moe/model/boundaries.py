"""Tell the network what the faces of each sample's box are.

Shapes: B samples, x y z grid of tokens, S tokens per sample (on this rank), 3 axes, 2 faces of an axis (low, high), K
kinds of a face that is not periodic (wall, open), D model width. Codes of faces are those of
`shodh_moe.base.boundaries`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shodh_moe.base.boundaries import KINDS
from shodh_moe.base.parameters import mark
from shodh_moe.parallel import ALONE, ContextParallel

WALL, OPEN, PERIODIC = range(len(KINDS))


class BoundaryEmbedding(nn.Module):
    """Learned vectors, zero before training, to be added to the tokens of a sample.

    A wall or an open face adds its vector to the tokens next to it, and a periodic axis adds its vector to all tokens.
    So the network is told where a face is, at every size of the box, and a flow that is shifted along a periodic axis
    gets the same vectors. Axes and ends have vectors of their own: a face acts on the velocity component across it, and
    a bed is not a lid. A face of unknown kind adds nothing.

    (Ours. Walrus, arXiv 2511.15684, marks cells that it pads at the faces with a channel for each kind.)

    Args:
        dim: D.
        cp: which slab of each sample this rank has.
    """

    def __init__(self, dim: int, cp: ContextParallel = ALONE):
        super().__init__()
        self.cp = cp
        self.face_32KD = nn.Parameter(torch.zeros(3, 2, PERIODIC, dim))
        self.periodic_3D = nn.Parameter(torch.zeros(3, dim))
        mark(self.face_32KD, decay=False)
        mark(self.periodic_3D, decay=False)

    def forward(self, boundary_B32: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Return what to add to the tokens, [B, S, D].

        Args:
            boundary_B32: codes of the faces, int64.
            grid: x, y, z on this rank. Faces are those of the whole sample.
        """
        dtype = self.face_32KD.dtype
        kind_B32K = (boundary_B32[..., None] == torch.arange(PERIODIC, device=boundary_B32.device)).to(dtype)
        face_B32D = torch.einsum("bafk,afkd->bafd", kind_B32K, self.face_32KD)
        all_B3D = periodic_axes(boundary_B32).to(dtype)[..., None] * self.periodic_3D
        added = all_B3D.sum(1)[:, None, None, None]
        for axis, size in enumerate(self.cp.whole(grid)):
            first_n = torch.arange(size, device=boundary_B32.device) == 0
            side_n2 = torch.stack([first_n, first_n.flip(0)], dim=1).to(dtype)
            if axis == 0:  # only the first and the last slab have a face across it
                side_n2 = side_n2[self.cp.slab(size)]
            along_BnD = torch.einsum("nf,bfd->bnd", side_n2, face_B32D[:, axis])
            shape = [grid[axis] if other == axis else 1 for other in range(3)]
            added = added + along_BnD.view(len(boundary_B32), *shape, -1)
        return added.flatten(1, 3)


def periodic_axes(boundary_B32: Tensor) -> Tensor:
    """Whether each axis of each sample is periodic, bool [B, 3]."""
    return (boundary_B32 == PERIODIC).all(2)
