"""Whether NVIDIA's apex is there: by what it provides, since an unrelated package of the registry has its name."""

from __future__ import annotations

from importlib import import_module


def has_apex(*modules: str) -> bool:
    """Whether apex has its fused optimizers, and these modules too."""
    try:
        for name in ("apex.optimizers", *modules):
            import_module(name)
        return hasattr(import_module("apex.optimizers"), "FusedAdam")
    except Exception:  # the unrelated package fails with whatever it likes
        return False
