"""Checkpoints: complete, atomic, and refused by name when damaged (DESIGN 8).

A checkpoint is a folder ``checkpoints/<step>``: ``model.safetensors`` and ``optimizer.safetensors`` hold one
logical tensor per parameter (experts stacked over the global expert axis, so any expert-parallel size can read
it), ``rng.safetensors`` the random state of every rank, ``state.json`` the step, the config and a SHA-256 of
each file. It is written under a temporary name, synced, then renamed; the file ``latest`` moves last.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from shodh_moe.errors import UserError
from shodh_moe.files import sha256, whole_folder, write_text
from shodh_moe.parallel import ExpertParallel

EXPERT_MARK = ".experts."  # parameters under this name are stacked [local experts, ...]


def gather_experts(local: Tensor, ep: ExpertParallel) -> Tensor:
    """[L, ...] of each rank -> [E, ...], in global expert order, on every rank of the group."""
    if ep.size == 1:
        return local.detach().clone()
    parts = [torch.empty_like(local) for _ in range(ep.size)]
    dist.all_gather(parts, local.detach().contiguous(), group=ep.group)
    return torch.cat(parts)


def shard_experts(tensors: dict[str, Tensor], ep: ExpertParallel) -> dict[str, Tensor]:
    """This rank's share of every tensor with an expert axis; the others unchanged."""
    shard = {}
    for name, tensor in tensors.items():
        if EXPERT_MARK in name and tensor.dim():
            mine = ep.local_experts(len(tensor))
            tensor = tensor[mine.start : mine.stop]
        shard[name] = tensor
    return shard


def save_checkpoint(
    folder: Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    ep: ExpertParallel,
    config: dict[str, Any],
    keep_last: int,
) -> None:
    """Write ``folder/<step>`` from all ranks together; rank 0 keeps the newest ``keep_last`` checkpoints.

    Raises:
        UserError: no space or no permission. What was written before stays as it was.
    """
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = {"": parameter, **optimizer.state.get(parameter, {})}
        for key, value in state.items():
            logical = gather_experts(value, ep) if EXPERT_MARK in name and value.dim() else value.detach().clone()
            (moments if key else weights)[f"{name}/{key}" if key else name] = logical.cpu()
    rng = torch.get_rng_state()
    all_rng = [torch.empty_like(rng) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    _gather_bytes(rng, all_rng)
    if dist.get_rank() == 0:
        tensors = {
            "model.safetensors": weights,
            "optimizer.safetensors": moments,
            "rng.safetensors": {f"rank_{i}": state for i, state in enumerate(all_rng or [])},
        }
        write_checkpoint(folder, step, tensors, {"config": config, "world_size": dist.get_world_size()})
        for old in list_checkpoints(folder)[:-keep_last]:
            shutil.rmtree(folder / str(old))
    dist.barrier()


def _gather_bytes(rng: Tensor, out: list[Tensor] | None) -> None:
    """Random states to rank 0. NCCL moves only device tensors."""
    if dist.get_backend() == "nccl":
        parts = [torch.empty_like(rng).cuda() for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rng.cuda())
        if out is not None:
            out[:] = [part.cpu() for part in parts]
    else:
        dist.gather(rng, out)


def write_checkpoint(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], extra: dict[str, Any]) -> None:
    """Write the files of one checkpoint so that it appears whole or not at all, then point ``latest`` at it."""
    with whole_folder(folder / str(step)) as temporary:
        hashes = {}
        for name, group in tensors.items():
            save_file({key: value.contiguous() for key, value in group.items()}, temporary / name)
            hashes[name] = sha256(temporary / name)
        (temporary / "state.json").write_text(json.dumps({"step": step, "sha256": hashes, **extra}, indent=1))
    write_text(folder / "latest", f"{step}\n")


def list_checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending."""
    return sorted(int(path.name) for path in folder.glob("*") if path.is_dir() and path.name.isdigit())


def find_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest intact checkpoint and its ``state.json``, or None if there is none at all.

    A damaged one is named on standard output and the one before it used.

    Raises:
        UserError: there are checkpoints but every one is damaged.
    """
    steps = list_checkpoints(folder)
    for step in reversed(steps):
        path = folder / str(step)
        if damage := _damage(path):
            print(f"checkpoint {path} is refused: {damage}; trying the one before it", flush=True)
            continue
        return path, json.loads((path / "state.json").read_text())
    if steps:
        raise UserError(f"every checkpoint in {folder} is damaged: remove them to start again from step 0")
    return None


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        state = json.loads((path / "state.json").read_text())
        for name, expected in state["sha256"].items():
            if sha256(path / name) != expected:
                return f"{name} does not match its hash"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def load_model(path: Path, model: torch.nn.Module, ep: ExpertParallel) -> None:
    """Put the weights of a checkpoint folder into a model that holds this rank's experts."""
    model.load_state_dict(shard_experts(load_file(path / "model.safetensors"), ep))


def load_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ep: ExpertParallel) -> None:
    """Weights, optimizer state and, at the same number of ranks, random state from ``path``."""
    load_model(path, model, ep)
    stored = shard_experts(load_file(path / "optimizer.safetensors"), ep)
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in stored.items():
        name, _, moment = key.rpartition("/")
        state.setdefault(name, {})[moment] = value
    for name, parameter in model.named_parameters():
        if name in state:
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in state[name].items()
            }
    rng = load_file(path / "rng.safetensors")
    if len(rng) == dist.get_world_size():
        torch.set_rng_state(rng[f"rank_{dist.get_rank()}"])
