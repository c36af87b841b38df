"""`shodh merge`: merge models offline, in bounded memory; one config may have many outputs; resumable."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import disk_trouble
from shodh_moe.base.memory import give_back_freed_memory
from shodh_moe.merging import checks, drift, manifest
from shodh_moe.merging.config import Target, load_targets
from shodh_moe.merging.inputs import InputModel, Stored, open_input, verify_checkpoint
from shodh_moe.merging.layout import Described, OutputFile, output_dtype, plan_files
from shodh_moe.merging.names import without_wrappers
from shodh_moe.merging.output import Output
from shodh_moe.merging.reading import InputReader
from shodh_moe.merging.settings import DISTANCE_LIMIT, Lookup
from shodh_moe.merging.stream import MergeJob, Stream, recipe_for, slice_length
from shodh_moe.merging.sweep import require_distinct

AT_ONCE = 16  # maximum number of outputs made in one pass over the inputs
RESERVE = 64 << 20  # bytes for libraries loaded later, hashing, and small tables
UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_size(text: str) -> int:
    """Parse a size such as 512MiB, 5GB or 1000000 to bytes. Raises: UserError: it is not a size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = UNITS.get(match[2].upper()) if match else None
    if not match or unit is None:
        raise UserError(f"{text!r} is not a size: write it as 512MiB, 1GiB or 5GB")
    return int(float(match[1]) * unit)


def resident() -> int:
    """Resident memory of this process in bytes, after returning freed memory to the system."""
    give_back_freed_memory()
    return int(psutil.Process().memory_info().rss)


def memory_left(limit: int) -> int:
    """Bytes that this process may still use for buffers under a limit of ``limit`` bytes for the whole process."""
    return limit - resident() - RESERVE


def merge(
    config: Path | str | Mapping[str, Any],
    output: Path | str | None = None,
    memory_limit: str = "1GiB",
    out_shard_size: str = "5GB",
    rank: int = 0,
    size: int = 1,
    found: dict[str, Any] | None = None,
) -> list[Path]:
    """Write the outputs of a config, and return their folders.

    Args:
        config: YAML file in mergekit's format (docs/merging.md), or its content as a dictionary.
        output: new folder that overrides the config's ``output``; with a sweep, the folder of all outputs.
        memory_limit: memory limit of the whole process, including libraries.
        out_shard_size: largest size of a file.
        rank, size: processes with the same config share its outputs: this one makes number ``rank``,
            ``rank + size``, ... They do not communicate.
        found: for ccm with one axis, an alpha from an external readout that replaces the parameters ``alpha`` and
            ``coordinate``: ``{"found": "prefix", "value": 0.85, ...}``, JSON values that the manifest stores.

    Raises:
        UserError: the config, an input, the output folder, the disk or the memory limit is not suitable. Inputs are
            never modified, and no output is left incomplete.
    """
    targets = load_targets(config, Path(output) if output else None, found)
    return merge_targets(targets, parse_size(memory_limit), parse_size(out_shard_size), rank, size)


def merge_targets(targets: list[Target], limit: int, shard_bytes: int, rank: int = 0, size: int = 1) -> list[Path]:
    """Write the outputs of several targets, and return the folders of this process's share; see `merge`.

    Args:
        limit, shard_bytes: ``memory_limit`` and ``out_shard_size`` in bytes.
    """
    plans, models = plan_targets(targets, shard_bytes)
    for note in [note for model in models.values() for note in model.notes]:
        if rank == 0:
            print(f"[merge] {note}", flush=True)
    for warning in dict.fromkeys(f"{one.target.output}: {text}" for one in plans for text in one.target.warnings):
        if rank == 0:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    mine = plans[rank::size]
    left = [plan for plan in mine if not plan.made]
    for plan in mine:
        if plan.made:
            print(f"[merge] {plan.target.output} exists already", flush=True)
    for path in sorted({path for plan in left for path in plan.target.paths}):
        verify_checkpoint(models[path])
    for group in _groups(left, limit // 4):
        _run(group, models, limit)
    return [plan.target.output for plan in mine]


def plan_targets(targets: list[Target], shard_bytes: int) -> tuple[list[Plan], dict[str, InputModel]]:
    """Check all targets and their inputs without writing anything; return the plans, and the inputs by path.

    Raises:
        UserError: as `merge`, for everything that is known before tensors are read.
    """
    require_distinct(targets)
    paths = sorted({path for target in targets for path in target.paths})
    models = dict(zip(paths, without_wrappers([open_input(path) for path in paths]), strict=True))
    plans = [Plan(target, models, shard_bytes) for target in targets]
    checks.require_space({plan.target.output: plan.files for plan in plans if not plan.made})
    return plans, models


class Plan:
    """One output, after all checks, with its tensors assigned to files.

    Attributes:
        order: names of the tensors in the order of writing; ``described``: with their dtypes and shapes.
        identity: hash of everything that the output's bytes depend on.
        made: whether the output exists and was made by the same plan.
        held: most bytes that the method keeps in memory for one tensor.
    """

    def __init__(self, target: Target, models: dict[str, InputModel], shard_bytes: int):
        self.target = target
        checks.require_apart(target.output, target.paths)
        self.inputs = [models[path] for path in target.paths]
        reference = self.inputs[0]
        for other in self.inputs[1:]:
            checks.require_same_tensors(reference, other)
        checks.require_same_architecture(self.inputs)
        self.lookup = Lookup(target.config.parameters, target.settings)
        checks.require_matches(self.lookup.conditions(), list(reference.tensors))
        self.checkpoint = next((model for model in self.inputs if model.state), None)
        format = target.config.format or ("checkpoint" if reference.kind == "checkpoint" else "safetensors")
        if format == "checkpoint" and self.checkpoint is None:
            raise UserError(
                f"{target.output}: format checkpoint needs a checkpoint among the inputs, to copy its config"
            )
        dtype = target.config.out_dtype or target.config.dtype
        written: Described = {k: (output_dtype(one.dtype, dtype), one.shape) for k, one in reference.tensors.items()}
        # Widest dtypes first, so that every tensor is aligned; otherwise in the reference's order.
        self.order = sorted(written, key=lambda name: -written[name][0].itemsize)
        self.described = [(name, reference.tensors[name].dtype, reference.tensors[name].shape) for name in self.order]
        self.files: list[OutputFile] = plan_files({k: written[k] for k in self.order}, format, shard_bytes)
        self.identity = _identity(target, self.inputs, self.files)
        self.made = already_made(target.output, self.identity)
        self.held = max((self._held(name, stored) for name, stored in reference.tensors.items()), default=0)

    def _held(self, name: str, stored: Stored) -> int:
        merged = stored.dtype.is_floating_point or stored.dtype.is_complex
        try:
            return recipe_for(self.target, self.lookup, name, stored).held if merged else 0
        except UserError as error:
            raise UserError(f"{self.target.output}: {error}") from None


def _identity(target: Target, models: list[InputModel], files: list[OutputFile]) -> str:
    stats = [(model.path, [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in model.files]) for model in models]
    layout = [(file.name, list(file.tensors)) for file in files]
    parts = [target.config.model_dump(), target.alpha, target.models, stats, layout, manifest.versions()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def already_made(output: Path, identity: str) -> bool:
    """Whether the output was made by the same plan. Raises: UserError: the folder has other content."""
    if not output.exists():
        return False
    try:
        if json.loads((output / manifest.MANIFEST).read_text())["plan"] == identity:
            return True
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{output} exists but is not this merge of these inputs: remove it, or choose another output")


def _groups(plans: list[Plan], held: int) -> list[list[Plan]]:
    """Group outputs that can be made in one pass: up to `AT_ONCE` with the same tensors in the same order.

    Together, their methods keep at most ``held`` bytes in memory; one that needs more is made alone.
    """
    groups: list[list[Plan]] = []
    for plan in plans:
        alike = [
            group
            for group in groups
            if len(group) < AT_ONCE
            and group[0].described == plan.described
            and sum(one.held for one in [*group, plan]) <= held
        ]
        if alike:
            alike[0].append(plan)
        else:
            groups.append([plan])
    return groups


def _run(plans: list[Plan], models: dict[str, InputModel], limit: int) -> None:
    """Make several outputs in one pass over the inputs."""
    paths = sorted({path for plan in plans for path in plan.target.paths})
    order, reference = plans[0].order, plans[0].inputs[0]
    with ExitStack() as stack:
        readers = {}
        for path in paths:
            readers[path] = InputReader(models[path], order)
            stack.callback(readers[path].close)
        free = memory_left(limit) - sum(plan.held for plan in plans)
        length = slice_length(free, list(readers.values()), [len(plan.target.paths) for plan in plans])
        jobs: list[MergeJob] = []
        try:
            for plan in plans:
                output = Output(plan.target.output, plan.files, plan.identity)
                jobs.append(MergeJob(plan.target, output, plan.lookup))
            Stream(readers, jobs, length).run(order, reference.tensors)
            inputs = {path: reader.files() for path, reader in readers.items()}
            for plan, job in zip(plans, jobs, strict=True):
                _finish(plan, job, inputs)
        except UserError as error:
            # After a disk error the next try can resume; after any other error the work is useless.
            if not isinstance(error.__cause__, OSError):
                for job in jobs:
                    job.output.discard()
            raise
        except OSError as error:
            if reason := disk_trouble(error):
                raise UserError(f"cannot write {plans[0].target.output}: {reason}; complete files are kept") from error
            raise
        finally:
            for job in jobs:
                job.output.close()


def _finish(plan: Plan, job: MergeJob, inputs: dict[str, dict[str, Any]]) -> None:
    target = plan.target
    written = job.output.finish()
    if found := manifest.drift_of(target, written):
        assert target.base
        drift.require_near(found, target.base, plan.lookup.value("distance_limit", "", DISTANCE_LIMIT))
    notes = [note for model in plan.inputs for note in model.notes]
    job.output.publish(manifest.texts(target, plan.identity, plan.files, written, inputs, plan.checkpoint, notes))
    size = sum(record["bytes"] for record in written.values())
    print(f"[merge] {target.output}: {len(plan.order)} tensors, {size / 1e9:.3g} GB, {target.method}", flush=True)
