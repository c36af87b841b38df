"""The DeepSpeed engine around the latent transformer: process groups, optimizer, gradient reduction, clipping.

DeepSpeed owns initialisation, gradient averaging over the right group of each parameter, and the step.
Two parts are ours: it recognises only its own MoE class (see `_ExpertParallelMarker`), and its global norm
for float32 without ZeRO counts only the experts of the local rank (DeepSpeed issues 8475, 8613).
"""

from __future__ import annotations

import os
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups
from torch import Tensor, nn

from shodh_moe.config import Config
from shodh_moe.model import LatentTransformer, Prediction
from shodh_moe.parallel import ExpertParallel
from shodh_moe.training.deepspeed_config import deepspeed_config, expert_parallel_size


class _ExpertParallelMarker(DeepSpeedMoE):
    """What makes DeepSpeed treat our expert parameters as experts.

    The engine looks for instances of its own MoE class, then calls ``set_deepspeed_parallelism`` on every
    module that has it, before it broadcasts parameters. This parameter-free child is both, so that the model
    itself stays free of DeepSpeed.
    """

    def __init__(self, model: LatentTransformer, ep: ExpertParallel):
        nn.Module.__init__(self)  # DeepSpeed's own constructor would build its layer
        self.num_experts = model.config.moe.num_experts
        self._ep = ep

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        name = f"ep_size_{self._ep.size}"
        if name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(self._ep.size)
        self._ep.group = groups._get_expert_parallel_group(name)


class _TrainedModule(nn.Module):
    def __init__(self, model: LatentTransformer, marker: nn.Module):
        super().__init__()
        self.model, self.marker = model, marker

    def forward(self, history: Tensor, geometry: Tensor) -> Prediction:
        return self.model(history, geometry)


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether the parameter belongs to the experts of this rank alone (DeepSpeed's own mark)."""
    return not getattr(parameter, "allreduce", True)


class Engine:
    """A DeepSpeed engine with one call per micro-batch.

    Attributes:
        model: the latent transformer with this rank's experts.
        ep: the rank's expert-parallel group.
        optimizer: torch AdamW over DeepSpeed's parameter groups.
        device: where batches must be.
    """

    def __init__(self, config: Config, latent_channels: int, latent_grid: list[int]):
        world, rank = dist.get_world_size(), dist.get_rank()
        size = expert_parallel_size(config, world)
        self.ep = ExpertParallel(size, rank % size)
        self.model = LatentTransformer(config.model, latent_channels, latent_grid, config.seed, self.ep)
        for layer in self.model.moe_layers:
            for parameter in layer.experts.parameters():
                parameter.allreduce = False  # type: ignore[attr-defined]
                parameter.group_name = f"ep_size_{size}"  # type: ignore[attr-defined]

        module = _TrainedModule(self.model, _ExpertParallelMarker(self.model, self.ep))
        t = config.training
        parameters = split_params_into_different_moe_groups_for_optimizer(_weight_decay_groups(module, t.weight_decay))
        self.optimizer = torch.optim.AdamW(parameters, lr=t.learning_rate, betas=(t.betas[0], t.betas[1]))
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=self.optimizer, config=deepspeed_config(config, world)
        )
        self.device = self._engine.device
        self._clip = t.grad_clip
        if not self._engine.has_moe_layers:
            raise RuntimeError("DeepSpeed did not recognise the experts: their gradients would be wrong")

    def __call__(self, history_BHCxyz: Tensor, geometry_BCxyz: Tensor) -> Prediction:
        return self._engine(history_BHCxyz, geometry_BCxyz)

    def step(self, loss: Tensor, learning_rate: float) -> float | None:
        """Backward; after the last micro-batch of a step reduce gradients, clip by the global norm, update.

        Returns the norm before clipping, None while gradients accumulate. They are those of the mean loss of the
        step's micro-batches.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        last = self._engine.is_gradient_accumulation_boundary()
        self._engine.backward(loss)
        norm = self.gradient_norm() if last else None
        if norm is not None and norm > self._clip:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self._clip / norm)
        self._engine.step()
        return norm

    def gradient_norm(self) -> float:
        """L2 norm over every parameter counted once: shared ones here, experts over the whole EP group."""
        squares = torch.zeros(2, dtype=torch.float64, device=self.device)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                squares[int(is_expert(parameter))] += parameter.grad.double().square().sum()
        dist.all_reduce(squares[1:], group=self.ep.group)
        return float(squares.sum().sqrt())


def _weight_decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases, prototypes and the temperature do not."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        (decay if parameter.dim() >= 2 and "prototypes" not in name else plain).append(parameter)
    return [
        {"name": "decay", "params": decay, "weight_decay": weight_decay},
        {"name": "no_decay", "params": plain, "weight_decay": 0.0},
    ]


def init_distributed() -> None:
    """Join the process group that the launcher's variables describe (a single process makes its own)."""
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("MASTER_PORT", "29500")
    # DeepSpeed would compile a shared-memory operation that serves inference alone: a minute or two at the first
    # start, and no start at all without a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if os.environ.get("DS_ACCELERATOR") == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
