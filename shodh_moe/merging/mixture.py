"""`shodh merge mixture`: N domain experts, trained from one anchor, become the paths of one mixture of experts.

Tensors are read whole, one at a time, and written in pieces of one expert each.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import disk_trouble
from shodh_moe.config.paths import resolve_paths
from shodh_moe.merging import checks, manifest
from shodh_moe.merging.drift import Drift, require_near, summary
from shodh_moe.merging.inputs import InputModel, open_input, verify_checkpoint
from shodh_moe.merging.layout import OutputFile, plan_files
from shodh_moe.merging.merge import already_made, memory_left, parse_size
from shodh_moe.merging.mixture_config import Mixture, config_of, load_mixture, mixture_model
from shodh_moe.merging.mixture_router import router_weights
from shodh_moe.merging.mixture_tensors import ROUTER, MixtureTensor, known_tensor, mixture_tensors
from shodh_moe.merging.output import Output
from shodh_moe.merging.reading import InputReader
from shodh_moe.merging.recipe import BLOCK

SLICE = 16 * BLOCK  # elements that are compared with the base at once
COPIES = 6  # copies of a tensor in memory at once: inputs, their sum in float64, and the result


def merge_mixture(
    config: Path, output: Path | None = None, memory_limit: str = "1GiB", out_shard_size: str = "5GB"
) -> Path:
    """Write the mixture that a config describes as a checkpoint of weights, and return its folder.

    Args:
        config: YAML file (docs/merging.md).
        output: new folder that overrides the config's ``output``.
        memory_limit: memory limit of the whole process, including libraries. Several copies of the largest tensor of
            an expert must fit into it.
        out_shard_size: largest size of a file; a larger tensor gets its own.

    Raises:
        UserError: the config, an input, the latents, the output folder, the disk or the memory limit is not suitable.
            Inputs are never modified, and no output is left incomplete.
    """
    limit, shard_bytes = parse_size(memory_limit), parse_size(out_shard_size)
    mixture = load_mixture(config, output)
    checks.require_apart(mixture.output, mixture.paths)
    base, *experts = models = [open_input(path) for path in mixture.paths]
    section = mixture_model(mixture, experts[0])
    checks.require_same_architecture(models)
    for expert in experts:
        checks.require_same_tensors(base, expert)
    dense = config_of(experts[0]).model.moe.num_experts == 0
    tensors = mixture_tensors(base.tensors, len(experts), dense, section.moe.attention)
    router, record, warnings = _router(mixture, experts, section)
    tensors |= {name: known_tensor(weight) for name, weight in router.items()}
    for warning in warnings:
        print(f"warning: {mixture.output}: {warning}", file=sys.stderr, flush=True)
    described = {name: (one.dtype, one.shape) for name, one in tensors.items()}
    order = sorted(described, key=lambda name: -described[name][0].itemsize)
    files = plan_files({name: described[name] for name in order}, "checkpoint", shard_bytes)
    identity = _identity(mixture, models, files, router)
    if already_made(mixture.output, identity):
        print(f"[merge] {mixture.output} exists already", flush=True)
        return mixture.output
    checks.require_space({mixture.output: files})
    _require_memory(base, experts, limit)
    for model in models:
        verify_checkpoint(model)
    with ExitStack() as stack:
        readers = []
        for model in models:
            readers.append(InputReader(model, list(model.tensors)))
            stack.callback(readers[-1].close)
        drift = _require_one_anchor(mixture, readers)
        made = Output(mixture.output, files, identity)
        try:
            _write(made, readers[1:], {name: tensors[name] for name in order})
            written = made.finish()
            inputs = {reader.model.path: reader.files() for reader in readers}
            roles = {path: "base" if i == 0 else mixture.experts[i - 1].domain for i, path in enumerate(mixture.paths)}
            facts = {
                "merge": {"merge_method": "mixture", **mixture.config.model_dump(exclude_none=True)},
                "model": section.model_dump(),
                "router": record,
                **drift,
                "notes": warnings,
            }
            made.publish(_texts(identity, facts, files, written, inputs, roles, experts[0]))
        except OSError as error:
            if reason := disk_trouble(error):
                raise UserError(f"cannot write {mixture.output}: {reason}; complete files are kept") from error
            raise
        except UserError:
            made.discard()
            raise
        finally:
            made.close()
    size = sum(one["bytes"] for one in written.values())
    names = ", ".join(expert.domain for expert in mixture.experts)
    print(f"[merge] {mixture.output}: {len(order)} tensors, {size / 1e9:.3g} GB, paths {names}", flush=True)
    return mixture.output


def _router(
    mixture: Mixture, experts: list[InputModel], section: Any
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Return the router's weights by name, its record for the manifest, and warnings; an oracle has no weights."""
    kind = section.moe.router.kind
    if kind == "oracle":
        return {}, {"kind": kind, "experts": [expert.domain for expert in mixture.experts]}, []
    given = mixture.config.latents
    folders = [Path(given) if given else resolve_paths(config_of(expert)).latents for expert in experts]
    domains = [expert.domain for expert in mixture.experts]
    weights, record, warnings = router_weights(section, domains, folders, config_of(experts[0]).seed)
    return weights, {"kind": kind, "latents": sorted({str(folder) for folder in folders}), **record}, warnings


def _require_memory(base: InputModel, experts: list[InputModel], limit: int) -> None:
    largest = max(stored.nbytes for stored in base.tensors.values())
    needed = COPIES * largest + (len(experts) + 1) * 3 * SLICE * 8
    if (missing := needed - memory_left(limit)) > 0:
        raise UserError(
            f"the memory limit is {math.ceil(missing / 2**20)} MiB too small for the largest tensor of an expert: "
            "raise --memory-limit"
        )


def _require_one_anchor(mixture: Mixture, readers: list[InputReader]) -> dict[str, Any]:
    """Measure the experts' distances from the base, and return their `summary`.

    Raises:
        UserError: an input has NaN or infinity, or an expert is too far from the base to have been trained from it.
    """
    sums = []
    for name, stored in readers[0].model.tensors.items():
        if name.startswith(ROUTER) or not stored.dtype.is_floating_point:
            continue
        drift = Drift()
        for start in range(0, stored.numel, SLICE):
            length = min(SLICE, stored.numel - start)
            drift.add([_read(reader, name, start, length) for reader in readers])
        sums.append(drift.sums())
    found = summary(sums, [expert.model for expert in mixture.experts])
    require_near(found, mixture.config.base_model, mixture.config.distance_limit)
    return found


def _read(reader: InputReader, name: str, start: int, length: int) -> Tensor:
    """Part of a tensor, float32 or float64. Raises: UserError: it has NaN or infinity."""
    values = _stored(reader, name, start, length)
    values = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)
    if not values.isfinite().all():
        file = reader.model.file_of(name)
        raise UserError(f"{file}: tensor {name} has NaN or infinity: merge only finite weights")
    return values


def _stored(reader: InputReader, name: str, start: int, length: int) -> Tensor:
    dtype = reader.model.tensors[name].dtype
    buffer = torch.empty(length * dtype.itemsize, dtype=torch.uint8)
    reader.read(name, start, buffer.numpy().data)
    return buffer.view(dtype)


def _write(output: Output, readers: list[InputReader], tensors: dict[str, MixtureTensor]) -> None:
    def read(expert: int, name: str) -> Tensor:
        stored = readers[expert].model.tensors[name]
        return _stored(readers[expert], name, 0, stored.numel).view(stored.shape)

    for name, tensor in tensors.items():
        if output.has(name):
            continue
        offset = 0
        for make in tensor.pieces:
            data = make(read).contiguous().reshape(-1).view(torch.uint8).numpy().data
            output.write(name, offset, data).result()
            offset += len(data)


def _identity(mixture: Mixture, models: list[InputModel], files: list[OutputFile], router: dict[str, Tensor]) -> str:
    stats = [(model.path, [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in model.files]) for model in models]
    layout = [(file.name, list(file.tensors)) for file in files]
    weights = {name: hashlib.sha256(weight.numpy().tobytes()).hexdigest() for name, weight in router.items()}
    parts = [mixture.config.model_dump(), stats, layout, weights, manifest.versions()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _texts(
    identity: str,
    facts: dict[str, Any],
    files: list[OutputFile],
    written: dict[str, dict[str, Any]],
    inputs: dict[str, dict[str, Any]],
    roles: dict[str, str],
    reference: InputModel,
) -> dict[str, str]:
    """The manifest and ``state.json``, by name. The config is the first expert's, with the mixture's model.

    Args:
        facts: entries of the manifest.
        roles: of each input, by its path.
    """
    hashes = {name: {"bytes": one["bytes"], "sha256": one["sha256"]} for name, one in written.items()}
    described = {path: {"role": roles[path], "files": found} for path, found in inputs.items()}
    whole = {"format": manifest.MANIFEST_FORMAT, "plan": identity, **facts, "inputs": described, "outputs": hashes}
    text = json.dumps({**whole, "versions": manifest.versions()}, indent=2) + "\n"
    config = {**reference.state["config"], "model": facts["model"]}
    # The experts' own weights of domains may leave the others out.
    config["data"] = {key: value for key, value in config.get("data", {}).items() if key != "weights"}
    state = manifest.state_text("mixture", files, hashes, {**reference.state, "config": config})
    return {manifest.MANIFEST: text, manifest.STATE: state}
