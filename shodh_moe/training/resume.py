"""Resume a run: rank 0 chooses and checks the checkpoint, and every rank reads its own part of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shodh_moe.base.errors import EXIT_USER_ERROR, UserError
from shodh_moe.checkpoint import CheckpointReader, Damaged, damage, find_checkpoint, mismatch, resolve_checkpoint
from shodh_moe.config.inputs import Inputs, require_same_inputs
from shodh_moe.training.task import Task


def restore_checkpoint(checkpoints: Path, resume: str, task: Task) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Load weights, optimizer state and, if the number of ranks is the same, random state (collective).

    Args:
        checkpoints: the run's folder of checkpoints.
        resume: ``auto`` for the newest intact checkpoint of the folder, if there is one; or a checkpoint folder.

    Returns:
        {path, step, world_size, start} of the checkpoint, or None to start from scratch; and this rank's own state in
        it, which is empty if the number of ranks has changed.

    Raises:
        UserError: on rank 0, if there are checkpoints but none is intact and fits, or the one that does was trained on
            other inputs; the other ranks exit silently.
    """
    engine, shapes = task.engine, task.engine.shapes()
    state: dict[str, Tensor] = {}
    found = on_rank_0(lambda: _find(checkpoints, resume, shapes, task.inputs))
    if found:
        reader = CheckpointReader(Path(found["path"]))
        engine.load(reader)
        if found["world_size"] == dist.get_world_size():
            state = reader.rank_state(dist.get_rank())
            _restore_random_state(state)
    return found, state


def load_initial_weights(path: Path, task: Task) -> dict[str, Any]:
    """Load the weights of another run as the start of a new one (collective).

    Args:
        path: a run folder (its newest intact checkpoint is used) or a checkpoint of any layout, including a merged one.

    Returns:
        {path, step, sha256 of its state}.

    Raises:
        UserError: on rank 0, if there is no checkpoint or its tensors do not fit this network; the other ranks exit
            silently.
    """
    found: dict[str, Any] = on_rank_0(lambda: _find_weights(path, task))
    task.engine.load_weights(CheckpointReader(Path(found["path"])))
    return found


def _find_weights(path: Path, task: Task) -> dict[str, Any]:
    shapes = {name: shape for name, shape in task.engine.shapes().items() if name.startswith("model/")}
    remedy = "start: give a run folder or a checkpoint of the same network"
    try:
        found = resolve_checkpoint(path)
    except Damaged as error:
        raise UserError(f"cannot start from {path}: {error}; {remedy}") from None
    if found is None:
        raise UserError(f"{path} has no checkpoint to start from; {remedy}")
    path, state = found, CheckpointReader(found).state
    weights = {name: record for name, record in state["tensors"].items() if name.startswith("model/")}
    if reason := mismatch({"tensors": weights}, shapes) or task.check_start(state):
        raise UserError(f"cannot start from {path}: {reason}; {remedy}")
    return {"path": str(path), "step": state["step"], "sha256": state["sha256"]}


def _find(checkpoints: Path, resume: str, shapes: dict[str, list[int]], inputs: Inputs) -> dict[str, Any] | None:
    """Return {path, step, world_size, start} of the checkpoint to resume from, None to start from scratch."""
    if resume == "auto":
        found = find_checkpoint(checkpoints, shapes)
        if found is None:
            return None
        path, state = found
    else:
        path = Path(resume)
        if reason := damage(path) or mismatch(path, shapes):
            raise UserError(f"checkpoint {path} is refused: {reason}")
        state = CheckpointReader(path).state
    require_same_inputs(path, state, inputs)
    if inputs and "inputs" not in state:
        print(
            f"checkpoint {path} is of an earlier version and does not record its data and latents: make sure that they "
            "have not changed since",
            flush=True,
        )
    return {"path": str(path), **{key: state.get(key) for key in ("step", "world_size", "start")}}


def on_rank_0(work: Callable[[], Any], share: bool = True) -> Any:
    """Call ``work`` on rank 0 alone and return its result on every rank (collective).

    Args:
        share: False if the result cannot be pickled; the other ranks then get None.

    Raises:
        Exception: on rank 0, whatever ``work`` raised.
        SystemExit: on the other ranks, if it raised.
    """
    message: list[Any] = [None, True]  # the result, and whether there is one
    error: Exception | None = None
    result: Any = None
    if dist.get_rank() == 0:
        try:
            result = work()
            message[0] = result if share else None
        except Exception as raised:
            error, message[1] = raised, False
    dist.broadcast_object_list(message, device=torch.device("cuda") if dist.get_backend() == "nccl" else None)
    if error:
        raise error
    if not message[1]:
        raise SystemExit(EXIT_USER_ERROR)  # silently: rank 0 reports the reason
    return result if dist.get_rank() == 0 else message[0]


def random_state() -> dict[str, Tensor]:
    """Return the state of this rank's random generators, for a checkpoint."""
    states = {"rng/cpu": torch.get_rng_state()}
    return states | ({"rng/cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _restore_random_state(states: dict[str, Tensor]) -> None:
    if "rng/cpu" in states:
        torch.set_rng_state(states["rng/cpu"])
    if "rng/cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["rng/cuda"])
