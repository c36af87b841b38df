"""Run small pieces of code and trainings with faults on fake CUDA tensors; write what the watch recorded as JSON.

Argument: the file for the results.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from shodh_moe.config import Config
from shodh_moe.rehearsal.device import pretend_cuda

pretend_cuda(1, 4)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from shodh_moe.base.tensors import count_classes, sent, sent_numbers  # noqa: E402
from shodh_moe.rehearsal.pretraining import rehearse_pretraining  # noqa: E402
from shodh_moe.rehearsal.watch import Watch  # noqa: E402
from shodh_moe.training import engine  # noqa: E402
from shodh_moe.training.pretrain import LatentTask  # noqa: E402

CONFIG = Config.model_validate(
    {
        "data": {"grid": [16, 16, 16]},
        "tokenizer": {"latent_channels": 16},
        "model": {"dim": 32, "depth": 1, "heads": 2, "moe": {"num_experts": 2, "expert_hidden": 32}},
        "training": {"batch_size": 2, "precision": "bfloat16"},
        "parallel": {"ep_size": 2, "zero_stage": 1},
        "deepspeed": {"zero_optimization": {"reduce_bucket_size": 7000}},
    }
)

LAYER = {"scope": "layer", "attention": "shared"}
SLABS = {
    "samples": {
        "model": {"scale_history": True, "boundaries": True, "positions": "periodic_aware", "strides": [1, 2]},
        "training": {"unroll": 2, "unroll_gradient": "through", "history_noise": 0.1, "loss": "relative"},
    },
    "tokens, a router in each layer": {
        "model": {"moe": LAYER},
        "training": {"unroll": 2, "activation_checkpointing": True, "accumulation": 2},
    },
    "a path for each token": {
        "model": {"scale_history": True, "moe": {"top_k": 2, "router": {"context": "both", "balance": "global"}}},
        "training": {"unroll": 3, "unroll_gradient": "through"},
    },
    "two paths for a sample": {
        "model": {"moe": {"num_experts": 4, "top_k": 2, "router": {"balance": "bias"}}},
        "training": {"unroll": 2, "unroll_gradient": "through", "loss": "sample"},
        "parallel": {"zero_stage": 2},
    },
    "windows": {"model": {"moe": {"dropless": False, "router": {"context": "window", "window": 1}}}},
    "film": {
        "model": {
            "film": True,
            "scale_history": True,
            "moe": {**LAYER, "num_experts": 0, "shared_experts": 1},
        },
        "training": {"unroll": 2, "unroll_gradient": "through"},
        "parallel": {"ep_size": "auto", "context_size": 4},
    },
}


def with_slabs(changes: dict[str, Any]) -> Config:
    """`CONFIG` on a longer grid, whose samples two ranks share, with changes."""
    base = CONFIG.model_dump()
    base["data"]["grid"][0], base["parallel"]["context_size"], base["deepspeed"] = 32, 2, {}
    return Config.model_validate(_merged(base, changes))


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(base[key], value) for key, value in changes.items() if isinstance(value, dict)}
    return {**base, **changes, **both}


def on_device(*shape: int) -> Tensor:
    return torch.zeros(*shape, device="cuda")


def backward() -> str:
    weight = torch.nn.Parameter(on_device(8, 8))
    with torch.autocast("cuda", torch.bfloat16):
        y = torch.nn.functional.linear(on_device(4, 8), weight)
    y.float().square().sum().backward()
    return f"{y.dtype} {weight.grad.dtype} {weight.grad.device.type} {list(weight.grad.shape)}"


def freed() -> None:
    for _ in range(10):
        on_device(1000)


PIECES: dict[str, Callable[[], Any]] = {
    "item": lambda: on_device(1).item(),
    "tolist": lambda: on_device(3).tolist(),
    "bool": lambda: bool(on_device(1) > 0),
    "cpu": lambda: on_device(3).cpu(),
    "cpu without waiting": lambda: on_device(3).to("cpu", non_blocking=True),
    "nonzero": lambda: on_device(3).nonzero(),
    "bool index": lambda: on_device(3)[on_device(3) > 0],
    "list index": lambda: on_device(3)[[0, 1]],
    "bincount": lambda: torch.bincount(torch.zeros(3, dtype=torch.int64, device="cuda"), minlength=2).shape[0],
    "count_classes": lambda: count_classes(sent_numbers([1, 1, 0], "cuda"), 3).tolist(),
    "tensor": lambda: torch.tensor([1.0, 2.0], device="cuda"),
    "to": lambda: torch.zeros(3).to("cuda", non_blocking=True),
    "to, pinned": lambda: torch.zeros(3).pin_memory().to("cuda"),
    "sent": lambda: sent(torch.zeros(3), "cuda", torch.float64).dtype == torch.float64,
    "sent_numbers": lambda: sent_numbers([1, 2], "cuda").device.type,
    "repeat_interleave": lambda: list(
        torch.arange(2, device="cuda").repeat_interleave(sent_numbers([2, 3], "cuda")).shape
    ),
    "mixed devices": lambda: on_device(3) + torch.zeros(3),
    "reduction on the CPU": lambda: dist.all_reduce(torch.zeros(3)),
    "reduction": lambda: dist.all_reduce(on_device(3)),
    "exchange": lambda: dist.all_to_all_single(on_device(4, 2), on_device(4, 2)),
    "barrier": lambda: dist.barrier(),
    "backward": backward,
    "freed": freed,
}


def record(run: Callable[[Watch], Any]) -> dict[str, Any]:
    """Return the watch's records of a run and what it returned."""
    watch, error, result = Watch(), "", None
    try:
        with watch:
            result = run(watch)
    except Exception as failure:
        traceback.print_exc()
        error = f"{watch.place_of(failure)}: {type(failure).__name__}: {failure}"
    return {
        "error": error,
        "result": result if isinstance(result, str | int | list) else None,
        "peak": watch.memory.peak,
        "waits": [(*key, count) for key, count in watch.waits.items()],
        "collectives": [(*key, count, watch.sent[key]) for key, count in watch.collectives.items()],
        "products": [
            (*key[:3], " ".join(str(one).removeprefix("torch.") for one in key.dtypes), count)
            for key, count in watch.products.items()
        ],
        "peaks": watch.peaks,
    }


def read_a_loss(self: LatentTask, step: int, applied: bool) -> None:
    END(self, step, applied)
    float(self._batches[0].losses["loss"])


def reduce_again(self: LatentTask, step: int, applied: bool) -> None:
    END(self, step, applied)
    dist.all_reduce(torch.zeros(2, device="cuda"))


def leave_a_tensor(self: LatentTask, step: int, applied: bool) -> None:
    END(self, step, applied)
    self._counts.largest_L.add_(torch.zeros(len(self._counts.largest_L)))


END = LatentTask.end
TRAININGS: dict[str, AbstractContextManager[Any]] = {
    "none": nullcontext(),
    "a wait": patch.object(LatentTask, "end", read_a_loss),
    "a collective": patch.object(LatentTask, "end", reduce_again),
    "mixed devices": patch.object(LatentTask, "end", leave_a_tensor),
    "no autocast": patch.object(engine._TrainedModule, "forward", lambda self, *inputs: self.model(*inputs)),
}


def main() -> None:
    found = {}
    for name, piece in PIECES.items():
        found[name] = record(lambda watch, piece=piece: piece())
    for name, fault in TRAININGS.items():
        with fault:
            found[f"training: {name}"] = record(lambda watch: rehearse_pretraining(CONFIG, watch))
    configs = {name: with_slabs(changes) for name, changes in SLABS.items()}
    for name, config in configs.items():
        found[f"slabs: {name}"] = record(lambda watch, config=config: rehearse_pretraining(config, watch))
    dumped = {f"slabs: {name}": config.model_dump(mode="json") for name, config in configs.items()}
    dumped |= {f"training: {name}": CONFIG.model_dump(mode="json") for name in TRAININGS}
    Path(sys.argv[1]).write_text(json.dumps({"configs": dumped, "found": found}))


if __name__ == "__main__":
    main()
