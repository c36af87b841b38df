"""Time one AdamW step over the parameters of a whole model with each kernel that ``training.optimizer`` can select.

    python benchmarks/optimizer.py [--device cpu|cuda] [--json FILE]

Parameters, gradients and moments are float32. "shodh" is the kernel that ``training.optimizer: auto`` selects.
Every step reads parameter, gradient and two moments and writes all but the gradient: 28 bytes per parameter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from support.common import OURS, Report, run
from support.timing import Call, Missing, Times, first_line, release

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
BYTES, FLOPS = 28, 16  # per parameter
Make = Callable[[list[nn.Parameter]], Any]


def quickstart_shapes() -> list[torch.Size]:
    """Parameter shapes of the model of configs/quickstart.yaml."""
    from shodh_moe.config.load import load_config

    config = load_config(QUICKSTART)
    return _shapes(config.model, config.tokenizer.latent_channels)


def larger_shapes(depth: int) -> list[torch.Size]:
    """Parameter shapes of layers with about 8 million parameters each."""
    from shodh_moe.config import ModelConfig, MoEConfig

    moe = MoEConfig(scope="layer", num_experts=8, expert_hidden=512, shared_experts=1)
    return _shapes(ModelConfig(dim=512, depth=depth, heads=8, moe=moe), 128)


def _shapes(model: Any, channels: int) -> list[torch.Size]:
    from shodh_moe.model import LatentTransformer
    from shodh_moe.parallel import ExpertParallel

    with torch.device("cpu"):
        return [p.shape for p in LatentTransformer(model, channels, 0, ExpertParallel()).parameters()]


def step_of(
    make: Callable[[list[nn.Parameter]], Any], shapes: list[torch.Size], device: torch.device
) -> Call | Missing:
    """A call that makes one step, or the reason why the kernel cannot run."""

    def tensor(shape: torch.Size) -> Tensor:
        return torch.randn(shape, device=device)

    parameters = [nn.Parameter(tensor(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = tensor(parameter.shape)
    try:
        optimizer = make(parameters)
        optimizer.step()
    except Exception as error:
        return Missing(first_line(error))
    return lambda inputs: optimizer.step()


def bench_optimizer(report: Report, model: str, shapes: list[torch.Size]) -> None:
    from shodh_moe.config import TrainingConfig
    from shodh_moe.training.optimizer import make_optimizer, resolve_optimizer

    device, config = report.device, TrainingConfig()
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": (config.betas[0], config.betas[1])}

    def chosen(choice: str) -> Make:
        def make(parameters: list[nn.Parameter]) -> Any:
            resolved = resolve_optimizer(config.model_copy(update={"optimizer": choice}))
            return make_optimizer(resolved, [{"params": parameters, "weight_decay": config.weight_decay}], config)

        return make

    kinds = {
        OURS: chosen("auto"),
        "torch, one by one": lambda p: torch.optim.AdamW(p, foreach=False, fused=False, **settings),
        "torch, foreach": lambda p: torch.optim.AdamW(p, foreach=True, **settings),
        "torch, fused": lambda p: torch.optim.AdamW(p, fused=True, **settings),
        "deepspeed": chosen("deepspeed"),
        "apex": chosen("apex"),
    }
    calls: dict[str, Call | Missing] = {}
    for name, make in kinds.items():
        left_out = name == "deepspeed" and report.options.no_compile
        calls[name] = Missing("no compilation with --no-compile") if left_out else step_of(make, shapes, device)
    count = sum(shape.numel() for shape in shapes)

    def rate(name: str, times: Times) -> dict[str, float]:
        return {"parameters_per_s": count / times.median}

    case = {"model": model, "tensors": len(shapes), "parameters": count}
    report.measure("adamw_step", case, calls, [None], BYTES * count, FLOPS * count, rate)
    calls.clear()
    release(device)


def work(report: Report) -> None:
    if report.options.quick:
        report.options.no_compile = True
        return bench_optimizer(report, "quick", [torch.Size((8, 8)), torch.Size((8,))])
    cuda = report.device.type == "cuda"
    models = {"quickstart": quickstart_shapes(), "larger": larger_shapes(12 if cuda else 2)}
    for name, shapes in models.items():
        if not report.out_of_time("adamw_step", {"model": name}):
            bench_optimizer(report, name, shapes)
    return None


def main(arguments: list[str] | None = None) -> int:
    return run("optimizer", (__doc__ or "").splitlines()[0], work, arguments)


if __name__ == "__main__":
    sys.exit(main())
