"""The registry of routers. To add a router, add a file in model/routers and a line here.

Classes are named rather than imported, so that reading a config does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic_core import PydanticCustomError

# Value of model.moe.router.kind -> class, which implements `model.routers.Router`.
ROUTERS = {
    "cosine": "shodh_moe.model.routers.cosine:CosineRouter",
    "linear": "shodh_moe.model.routers.linear:LinearRouter",
    "oracle": "shodh_moe.model.routers.oracle:OracleRouter",
}


def check_kind(kind: object) -> object:
    """Return ``kind`` if a router of this name is registered; otherwise raise pydantic's error for a wrong literal."""
    return check_name(kind, ROUTERS)


def check_name(name: object, registry: Mapping[str, str]) -> object:
    """Return ``name`` if ``registry`` has it; otherwise raise pydantic's error for a wrong literal."""
    if name not in list(registry):
        *names, last = map(repr, registry)
        raise PydanticCustomError(
            "literal_error", "Input should be {expected}", {"expected": f"{', '.join(names)} or {last}"}
        )
    return name
