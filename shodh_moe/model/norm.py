"""RMS norm (arXiv 1910.07467) by two back ends of one formula and one parameter name: a checkpoint fits either."""

from __future__ import annotations

import torch
from torch import nn

from shodh_moe.base.environment import has_apex
from shodh_moe.base.errors import UserError

# What torch.nn.RMSNorm takes for float32 by itself. Apex has another default, and torch one for each dtype.
EPS = torch.finfo(torch.float32).eps


def make_norm(dim: int, backend: str) -> nn.Module:
    """RMS norm over the last axis of ``dim`` features, with one learned scale each, named ``weight``.

    Args:
        dim: width of the last axis.
        backend: ``torch`` or ``apex``, as `available_norm` gives it.
    """
    if backend == "apex":
        from apex.normalization import FusedRMSNorm

        return FusedRMSNorm(dim, eps=EPS)
    return nn.RMSNorm(dim, eps=EPS)


def available_norm(choice: str, device_type: str) -> str:
    """The back end that ``training.norm`` means on this device: ``torch`` or ``apex``.

    Args:
        choice: ``auto``, ``torch`` or ``apex``.
        device_type: ``cpu`` or ``cuda``.

    Raises:
        UserError: apex is asked for and cannot be used.
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
    # Torch has had a fused CUDA kernel since 2.9 (pull request 153666: about 9x the composite it replaces), which
    # follows autocast and needs nothing built. Only an older torch gains from apex.
    fused = hasattr(torch.ops.aten, "_fused_rms_norm")
    return "apex" if device_type == "cuda" and not fused and _has_fused_norm() else "torch"


def _has_fused_norm() -> bool:
    """A build of apex without its CUDA extensions lacks the kernel."""
    return has_apex("apex.normalization", "fused_layer_norm_cuda")
