"""The rows of the benchmark's tables, in their order."""

from __future__ import annotations

ROWS = {
    "anchor": "anchor",
    "low": "low expert",
    "high": "high expert",
    "best_endpoint": "best endpoint by validation",
    "average": "endpoint average",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "dare": "DARE",
    "ccm_coordinate": "CCM, coordinate",
    "ccm_scale": "CCM, scale",
    "ccm_prefix": "CCM, prefix",
    "oracle": "CCM, oracle alpha",
    "wrong_sign": "CCM, wrong sign",
    "conditioned": "conditioned network",
    "fine_tuned": "fine-tuned on K frames",
}
READOUTS = ("ccm_coordinate", "ccm_scale", "ccm_prefix")
OOD = ("ood_low", "ood_high")

_FAMILIES = {
    "reaction_diffusion": "reaction-diffusion",
    "navier_stokes": "Navier-Stokes",
    "shallow_water": "shallow water",
}


def family_title(name: str) -> str:
    """A family's name as a person writes it."""
    return _FAMILIES.get(name, name.replace("_", " "))
