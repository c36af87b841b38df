"""Small models on disk in every format, and merges of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from shodh_moe.checkpoint import CheckpointWriter, Fragment
from shodh_moe.merging import merge
from shodh_moe.merging.settings import Lookup, Setting

State = dict[str, Tensor]


def network(seed: int = 0, *, near: State | None = None, distance: float = 0.1) -> State:
    """Return tensors of every kind, or the tensors of ``near`` with a little noise."""
    random = torch.Generator().manual_seed(seed)
    if near is not None:
        return {name: _moved(tensor, random, distance) for name, tensor in near.items()}
    return {
        "lift.weight": torch.randn(40, 30, generator=random),
        "lift.bias": torch.randn(40, generator=random),
        "spectral.weight": torch.randn(6, 6, 9, dtype=torch.complex64, generator=random),
        "double": torch.randn(70, dtype=torch.float64, generator=random),
        "half": torch.randn(100, generator=random).half(),
        "brain": torch.randn(100, generator=random).bfloat16(),
        "scale": torch.randn((), generator=random),
        "nothing": torch.zeros(0, 3),
        "steps": torch.tensor(3),
        "mask": torch.tensor([True, False, True]),
    }


def _moved(tensor: Tensor, random: torch.Generator, distance: float) -> Tensor:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor.clone()
    wide = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
    return tensor + (distance * torch.randn(tensor.shape, dtype=wide, generator=random)).to(tensor.dtype)


def save(tensors: State, path: Path) -> str:
    """Save as safetensors, or as a torch state dict if ``path`` ends in .pt; return the path."""
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return str(path)


def save_checkpoint(tensors: State, folder: Path, ranks: int, step: int = 7, **facts: Any) -> str:
    """Save as a checkpoint with moments, of which each rank wrote a share of every tensor; return its folder."""
    logical = {f"{kind}/{name}": tensor for kind in ("model", "exp_avg") for name, tensor in tensors.items()}
    shapes = {name: list(tensor.shape) for name, tensor in logical.items()}
    writers = [CheckpointWriter(folder, rank, ranks, 9, 0, "first") for rank in range(ranks)]
    for rank, writer in enumerate(writers):
        fragments = []
        for name, tensor in logical.items():
            low, high = (tensor.numel() * r // ranks for r in (rank, rank + 1))
            if high > low:
                fragments.append(Fragment(name, low, tensor.reshape(-1)[low:high]))
        state = {"rng/cpu": torch.zeros(5, dtype=torch.uint8)}
        writer.save(step, fragments, shapes, state, {"config": {}, "tokenizer_sha256": "t", **facts})
    for writer in writers:
        writer.finish()
    return str(folder / str(step))


def config(folder: Path, method: str, models: list[Any], name: str = "merge.yaml", **words: Any) -> Path:
    """Write a config file; a model is a path, or a path and its parameters."""
    entries = [{"model": m} if isinstance(m, str) else {"model": m[0], "parameters": m[1]} for m in models]
    path = folder / name
    path.write_text(yaml.safe_dump({"merge_method": method, "models": entries, **words}, sort_keys=False))
    return path


def merged(folder: Path, method: str, models: list[Any], **words: Any) -> State:
    """Merge into ``folder / "out"``, or into ``output``, and return the tensors."""
    output = folder / words.pop("output", "out")
    limits = {key: words.pop(key) for key in ("memory_limit", "out_shard_size") if key in words}
    merge(config(folder, method, models, **words), output, **limits)
    return load(output)


def load(output: Path) -> State:
    if (output / "model.pt").exists():
        return torch.load(output / "model.pt", weights_only=True)
    found: State = {}
    for file in sorted(output.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_bits(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and bits(a[k]) == bits(b[k]) for k in a
    )


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def lookup(shared: dict[str, Setting] | None = None, own: list[dict[str, Setting]] | None = None) -> Lookup:
    return Lookup(shared or {}, own or [{}, {}])


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file in ``folder`` by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
