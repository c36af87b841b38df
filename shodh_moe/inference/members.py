"""Load the members of an ensemble, and continue a flow with all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.base.remote_file import local_folder
from shodh_moe.inference.loading import ModelSource, find_source, load_source
from shodh_moe.inference.model import Model
from shodh_moe.metrics.ensemble import mean_and_spread
from shodh_moe.tokenizer.tokenizer import tokenizer_sha256


def load_members(
    first: ModelSource, model: Model, others: tuple[Path | str, ...], tokenizer: Path | None = None, stride: int = 1
) -> list[Model]:
    """Load the other members of an ensemble, and return all, ``model`` first.

    Args:
        first: where ``model`` was loaded from.
        tokenizer: folder of the tokenizer of runs and checkpoints.
        stride: time stride with which all members are to predict.

    Raises:
        UserError: a member is missing or damaged, is given twice, has another tokenizer or number of snapshots, or was
            not trained with the stride.
    """
    members = [model]
    own, history = tokenizer_sha256(first.tokenizer_folder()), model.history
    for place in others:
        path = local_folder(place)
        exported = (path / "export.json").exists()
        source = find_source(path, None if exported else tokenizer)
        theirs = tokenizer_sha256(source.tokenizer_folder())
        if theirs != own:
            raise UserError(
                f"--members {path} has another tokenizer than {first.path} ({str(theirs)[:12]}, not {str(own)[:12]}): "
                "the members of an ensemble share one; train them on the same latents"
            )
        member = load_source(source)
        if member.history != history:
            raise UserError(
                f"--members {path} sees {member.history} snapshots, {first.path} sees {history}: "
                "give members with the same model.history"
            )
        if stride not in member.strides:
            known = ", ".join(map(str, member.strides))
            raise UserError(
                f"--members {path} was trained with the time stride {known}, not with {stride}: give members that "
                "were, or another --stride"
            )
        if member.weights_sha256 in {one.weights_sha256 for one in members}:
            raise UserError(f"--members {path} has the weights of another member: name each model once")
        members.append(member)
    return members


def continue_by_members(
    members: list[Model], fields_H4XYZ: Tensor, solid_1XYZ: Tensor, stride: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Continue a flow with every member by itself.

    Yields:
        as `Model.continue_flow`, both means over the members, and the spread of velocity and pressure [4, X, Y, Z].
    """
    flows = [member.continue_flow(fields_H4XYZ, solid_1XYZ, stride) for member in members]
    for found in zip(*flows, strict=True):
        mean_4XYZ, spread_4XYZ = mean_and_spread([exact_4XYZ for exact_4XYZ, _ in found])
        yield mean_4XYZ, torch.stack([conserved_3XYZ for _, conserved_3XYZ in found]).mean(0), spread_4XYZ
