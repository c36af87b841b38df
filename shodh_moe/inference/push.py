"""Upload an exported model to the model hub."""

from __future__ import annotations

import json
from pathlib import Path

from shodh_moe.base.errors import UserError
from shodh_moe.base.hub import HubAddress, hub_address, uploaded
from shodh_moe.inference.loading import verify_export


def push(folder: Path, name: str, revision: str | None = None, private: bool = False) -> str:
    """Upload an exported folder as one commit, and return the web address of its repository.

    Args:
        name: ``owner/name`` on the hub; the repository is made if it does not exist.
        revision: branch, made if it does not exist; None: ``main``.
        private: whether a new repository is private.

    Raises:
        UserError: the folder is no exported model or damaged, there is no token, or the hub refuses the upload or
            cannot be reached.
    """
    address = hub_address(name if name.startswith("hf://") else f"hf://{name}")
    if address is None or (address.revision and revision):
        raise UserError(f"{name} is not the name of a repository: write owner/name, and a branch with --revision")
    if not (folder / "export.json").exists():
        raise UserError(f"{folder} is no exported model: make one with `shodh checkpoint export`")
    if damages := verify_export(folder):
        raise UserError(f"{damages[0]}: export the model again or copy it again")
    described = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    message = f"{described['run']}, step {described['step']}"
    return uploaded(folder, HubAddress(address.name, revision or address.revision), message, private)
