"""Models of the model hub, by ``hf://owner/name``, through huggingface_hub (extra ``hub``).

The library reads HF_ENDPOINT, HF_TOKEN, HF_HOME and its other environment variables. Datasets of the hub,
``hf://datasets/...``, are files by URL (`remote`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import disk_trouble

_NAME = r"[\w.-]+/[\w.-]+"
_ADDRESS = re.compile(rf"hf://(?!datasets/|spaces/|buckets/)(?P<name>{_NAME})(?:@(?P<revision>[^@]+?))?/?")


class HubAddress(NamedTuple):
    """A repository of models on the hub, and a branch, tag or commit of it; None: the branch ``main``."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hf://{self.name}{f'@{self.revision}' if self.revision else ''}"


def hub_address(url: str) -> HubAddress | None:
    """Parse ``hf://owner/name[@revision]``; None for any other URL or path."""
    found = _ADDRESS.fullmatch(url)
    return HubAddress(found["name"], found["revision"]) if found else None


def downloaded(address: HubAddress) -> Path:
    """Download a model into the hub's cache, without its portable graphs, and return its folder there.

    Raises:
        UserError: huggingface_hub is missing, the repository or revision does not exist, it may not be read, the hub
            cannot be reached, or the disk is full.
    """
    with _explained(address):
        hub = _library()
        return Path(
            hub.snapshot_download(
                address.name, revision=address.revision, ignore_patterns=["portable/*"], endpoint=_endpoint()
            )
        )


def uploaded(folder: Path, address: HubAddress, message: str, private: bool = False) -> str:
    """Upload a folder to the hub as one commit, and return the web address of the repository.

    The repository and the branch are made if they do not exist. Files that are there already and not in the folder
    stay.

    Raises:
        UserError: as for `downloaded`, or there is no token.
    """
    with _explained(address):
        hub = _library()
        api = hub.HfApi(endpoint=_endpoint())
        if not hub.get_token():
            raise UserError(f"{address} cannot be written without a token: set HF_TOKEN, or run `hf auth login`")
        url = str(api.create_repo(address.name, private=private or None, exist_ok=True))
        if address.revision:
            api.create_branch(address.name, branch=address.revision, exist_ok=True)
        api.upload_folder(repo_id=address.name, folder_path=folder, revision=address.revision, commit_message=message)
        return url


def _endpoint() -> str | None:
    """Address of the hub, as the environment says now; the library reads it when it is imported."""
    return os.environ.get("HF_ENDPOINT") or None


def _library() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError("the model hub needs huggingface_hub: pip install 'shodh_moe[hub]'") from None
    return huggingface_hub


@contextmanager
def _explained(address: HubAddress) -> Iterator[None]:
    """Turn the library's errors into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(_reason(address, error)) from error


def _reason(address: HubAddress, error: Exception) -> str:
    from huggingface_hub import constants, errors

    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and len(causes) < 10:  # the library wraps errors of the connection
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    statuses = [one.response.status_code for one in causes if isinstance(one, errors.HfHubHTTPError)]
    for found in causes:
        if isinstance(found, errors.RevisionNotFoundError):
            return f"{address} does not exist: the repository has no branch, tag or commit {address.revision or 'main'}"
        if isinstance(found, (errors.GatedRepoError, errors.DisabledRepoError)):
            return f"{address} may not be read: accept its conditions on the hub's page, or ask its owner for access"
        if isinstance(found, errors.HFValidationError):
            return f"{address} is not the name of a repository: write owner/name"
        if isinstance(found, errors.OfflineModeIsEnabled):
            return f"{address} is not in the cache, and HF_HUB_OFFLINE forbids to download it: unset it"
    if 403 in statuses:
        return f"the hub refuses {address} (403): your token may not do this; check its permissions"
    if 401 in statuses or any(isinstance(one, errors.RepositoryNotFoundError) for one in causes):
        return f"{address} does not exist, or it is private: check the name, and the token in HF_TOKEN"
    if reason := next(filter(None, map(disk_trouble, causes)), None):
        return f"cannot write {address} to {constants.HF_HUB_CACHE}: {reason}"
    what = " ".join(str(causes[-1] if not statuses else error).split())[:150] or type(error).__name__
    hub = _endpoint() or constants.ENDPOINT
    return f"the hub at {hub} did not answer for {address} ({what}): check the connection and try again"
