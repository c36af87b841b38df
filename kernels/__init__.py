"""Fast kernels for the operations of this project, one file each; installed as ``shodh_moe.kernels``.

Each operation has a torch reference, which defines its result on every device.
"""

from shodh_moe.kernels.cosine_gating import cosine_topk_gating
from shodh_moe.kernels.dispatch import combine, dispatch
from shodh_moe.kernels.gating import Gating, expert_capacity, topk_gating
from shodh_moe.kernels.spectral_curl import curl, differentiation_matrix, divergence, divergence_adjoint

__all__ = [
    "Gating",
    "combine",
    "cosine_topk_gating",
    "curl",
    "differentiation_matrix",
    "dispatch",
    "divergence",
    "divergence_adjoint",
    "expert_capacity",
    "topk_gating",
]
