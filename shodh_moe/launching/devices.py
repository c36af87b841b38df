"""The GPUs that the user chose: every rank gets the list that was given to its launcher.

CUDA_VISIBLE_DEVICES lists the GPUs that a process may use, by number, UUID or name of a MIG device; an empty list hides
all of them. DeepSpeed's launcher replaces the list by 0, 1, ...: one number for each rank of the host.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from shodh_moe.base.errors import UserError
from shodh_moe.base.processes import ancestors, command_line
from shodh_moe.base.variables import number

if TYPE_CHECKING:
    import psutil

VARIABLE = "CUDA_VISIBLE_DEVICES"
VARIABLES = (VARIABLE, "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")  # the last two for AMD GPUs
# Programs of DeepSpeed's launcher, and those of its options that choose GPUs.
_LAUNCHERS = {"deepspeed", "ds", "deepspeed.launcher.runner", "deepspeed.launcher.launch"}
_CHOOSING = ("--include", "--exclude", "-i", "-e")


def names_in(value: str) -> list[str]:
    """Split the value of one of `VARIABLES` into the names of GPUs; [] if it is empty."""
    return [name.strip() for name in value.split(",")] if value.strip() else []


def describe_choice() -> str:
    """Return a phrase for messages: the variables that choose GPUs, or that there are none."""
    return ", ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ) or f"{VARIABLE} is unset"


def environment_of_each_gpu() -> list[dict[str, str]]:
    """Return, for each GPU that this process may use, the variables that let another process use this GPU only."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    hip = torch.version.hip is not None
    variable = next((name for name in reversed(VARIABLES if hip else VARIABLES[:1]) if name in os.environ), VARIABLE)
    names = names_in(os.environ[variable]) if variable in os.environ else [str(number) for number in range(count)]
    if count and all(name.startswith("MIG-") for name in names):  # CUDA shows a process one MIG device at most
        count = len(names)
    return [{variable: name} for name in names[:count]]


def accelerator() -> str:
    """Return DS_ACCELERATOR if it is set, else ``cuda`` if torch can use it, else ``cpu``."""
    import torch

    return os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")


def numbers_for_deepspeed(ranks: int) -> list[int | str]:
    """Return what DeepSpeed's launcher writes to CUDA_VISIBLE_DEVICES, with commas between: one entry for each rank.

    Raises:
        UserError: there are fewer GPUs than ranks.
    """
    import torch

    if accelerator() == "cuda" and ranks > torch.cuda.device_count():
        raise UserError(
            f"parallel.processes is {ranks}, and this process may use {torch.cuda.device_count()} GPUs "
            f"({describe_choice()}): each rank needs its own GPU, so lower parallel.processes or allow more GPUs"
        )
    names = names_in(os.environ.get(VARIABLE, ""))
    # Without enough names the ranks train on CPUs, and `restore_choice` gives them the list.
    return list(names[:ranks]) if len(names) >= ranks else list(range(ranks))


def require_own_gpu(kind: str) -> None:
    """Check that this rank can use the accelerator, with a GPU of its own.

    Args:
        kind: name of the accelerator, see `accelerator`.

    Raises:
        UserError: it is neither ``cpu`` nor ``cuda``, there is no GPU, or this host has more ranks than GPUs.
    """
    import torch

    if kind not in ("cpu", "cuda"):
        raise UserError(f"the variable DS_ACCELERATOR is {kind[:80]!r}: set it to cpu or cuda, or unset it")
    if kind == "cuda":
        local, gpus = number("LOCAL_RANK"), torch.cuda.device_count() if torch.cuda.is_available() else 0
        if local >= gpus:
            raise UserError(
                f"the rank with LOCAL_RANK {local} may use {gpus} GPUs ({describe_choice()}): "
                "each rank needs its own GPU, so start fewer ranks on this host or allow more GPUs"
            )


def require_choice_fits(slots: dict[str, int]) -> None:
    """Check that the hosts of a hostfile can use the list of this process, which all of them get.

    Args:
        slots: number of ranks by host.

    Raises:
        UserError: a host has more ranks than the list has GPUs, or the list names GPUs that only one machine has.
    """
    for variable in VARIABLES:
        names = names_in(os.environ.get(variable, ""))
        if len(slots) > 1 and (unique := [name for name in names if not name.lstrip("+-").isdecimal()]):
            raise UserError(
                f"{variable} names {unique[0][:80]!r}, a GPU of one machine, and the hostfile has {len(slots)} hosts: "
                f"use numbers, which every host has, or unset {variable}"
            )
        for host, ranks in slots.items() if names else ():
            if ranks > len(names):
                raise UserError(
                    f"{host} has slots={ranks} in the hostfile, and {variable}={os.environ[variable]} allows "
                    f"{len(names)} GPUs on each host: lower these slots, or change {variable}"
                )


def deepspeed_launchers() -> list[psutil.Process]:
    """Return the processes of DeepSpeed's launcher that started this rank, the nearest one first."""
    found: list[psutil.Process] = []
    for ancestor in ancestors() if "CROSS_SIZE" in os.environ else []:
        if not _LAUNCHERS.intersection(Path(word).name for word in command_line(ancestor)[:4]):
            break
        found.append(ancestor)
    return found


def launcher_options(launcher: psutil.Process) -> list[str]:
    """Return the command line of a process of DeepSpeed's launcher up to the script that it starts."""
    words = command_line(launcher)
    script = (number for number, word in enumerate(words) if word.endswith(".py") and "deepspeed" not in word)
    return words[: next(script, len(words))]


def restore_choice(keep_deepspeeds: bool = True) -> None:
    """In a rank that DeepSpeed's launcher started, set `VARIABLES` as the launcher got them.

    The list that DeepSpeed made is kept if an option of the launcher chooses GPUs.

    Args:
        keep_deepspeeds: keep that list also if the launcher got none.
    """
    import psutil

    launchers = deepspeed_launchers()
    if any(option.startswith(_CHOOSING) for launcher in launchers for option in launcher_options(launcher)):
        return
    with suppress(psutil.Error, OSError, IndexError):
        given = launchers[-1].environ()
        choice = {name: given[name] for name in VARIABLES if name in given}
        if choice or not keep_deepspeeds:
            for name in VARIABLES:
                os.environ.pop(name, None)
            os.environ.update(choice)
