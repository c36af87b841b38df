"""RMS norm (arXiv 1910.07467) from torch or apex: same formula and parameter name, so checkpoints fit both."""

from __future__ import annotations

import torch
from torch import nn

from shodh_moe.base.environment import has_apex
from shodh_moe.base.errors import UserError

# The default of torch.nn.RMSNorm for float32. Apex has a different default, and torch's depends on the dtype.
EPS = torch.finfo(torch.float32).eps


def make_norm(dim: int, backend: str, scale: float = 1.0) -> nn.Module:
    """RMS norm over the last axis of ``dim`` features, with one learned scale per feature, named ``weight``.

    Args:
        dim: width of the last axis.
        backend: ``torch`` or ``apex``, as returned by `available_norm`.
        scale: initial value of the scales.
    """
    if backend == "apex":
        from apex.normalization import FusedRMSNorm

        made = FusedRMSNorm(dim, eps=EPS)
    else:
        made = nn.RMSNorm(dim, eps=EPS)
    nn.init.constant_(made.weight, scale)
    return made


def available_norm(choice: str, device_type: str) -> str:
    """Resolve ``training.norm`` on this device to ``torch`` or ``apex``.

    Args:
        choice: ``auto``, ``torch`` or ``apex``.
        device_type: ``cpu`` or ``cuda``.

    Raises:
        UserError: the choice is apex and it cannot be used.
    """
    if choice == "apex":
        if not _has_fused_norm():
            raise UserError(
                "training.norm apex: NVIDIA's apex with its CUDA extensions is not installed (the package registry's "
                "`apex` is another project's): build it from source as the Dockerfile does, or set it to auto"
            )
        if device_type != "cuda":
            raise UserError("training.norm apex needs an NVIDIA GPU: set it to auto, or run with DS_ACCELERATOR=cuda")
    if choice != "auto":
        return choice
    # Since 2.9 torch has a fused CUDA kernel (pull request 153666: about 9x faster than the composite it replaces),
    # which follows autocast and needs no build. Only an older torch gains from apex.
    fused = hasattr(torch.ops.aten, "_fused_rms_norm")
    return "apex" if device_type == "cuda" and not fused and _has_fused_norm() else "torch"


def _has_fused_norm() -> bool:
    """Whether apex has its fused norm; a build without the CUDA extensions does not."""
    return has_apex("apex.normalization", "fused_layer_norm_cuda")
