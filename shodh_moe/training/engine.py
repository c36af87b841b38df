"""The DeepSpeed engine around a network, with or without experts: process groups, optimizer, gradients, clipping.

DeepSpeed broadcasts the initial parameters, averages each gradient over the right group, shards with ZeRO and makes the
step. We replace three parts. DeepSpeed recognises only its own MoE class (see `ExpertParallelMarker`). Its global norm
is wrong: without ZeRO it counts only the local rank's experts, and with ZeRO it averages their norms (DeepSpeed issues
8475, 8613), so `Engine.step` clips. It keeps a float64 model in float32 (see `in_float64`).

To DeepSpeed, ranks with different slabs of the same samples are data-parallel ranks like all others. They have the same
loss, that of whole samples, and each gets the gradients of all their losses (`ContextParallel.gather`), so the average
over the world is the gradient of the mean loss. DeepSpeed's own sequence parallelism would be wrong here: it sums over
such ranks instead of averaging, but not for experts, and it keeps the setting in a global variable.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.zero.stage_1_and_2 import IPGBucket
from torch import Tensor, nn

from shodh_moe.base.parameters import marks
from shodh_moe.base.tensors import sent_numbers
from shodh_moe.checkpoint import CheckpointReader, Fragment
from shodh_moe.config import RunConfig
from shodh_moe.model import LatentTransformer, MoE
from shodh_moe.parallel import ALONE, ContextParallel, ExpertParallel, Layout, place_experts
from shodh_moe.training.deepspeed_config import deepspeed_config
from shodh_moe.training.deepspeed_patches import ExpertParallelMarker, group_name, in_float64
from shodh_moe.training.optimizer import make_optimizer, make_state, resolve_optimizer, set_updates, updates
from shodh_moe.training.shards import (
    Shard,
    fragments,
    logical_shapes,
    shards_of_zero,
    shards_without_zero,
    squared_norms,
)


class _TrainedModule(nn.Module):
    """The network together with the marker for DeepSpeed; calls go to the network, in the training's precision.

    Autocast begins here and not around DeepSpeed's engine, because on a GPU the engine switches it off for its module.
    """

    def __init__(self, model: nn.Module, marker: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]):
        super().__init__()
        self.model, self.marker = model, marker
        self._autocast = autocast

    def forward(self, *inputs: Any) -> Any:
        with self._autocast():
            return self.model(*inputs)


@dataclass(frozen=True)
class Step:
    """The result of one optimizer step.

    Attributes:
        norm: L2 norm of all gradients before clipping, with each parameter counted once.
        shared_norm: L2 norm of all gradients except those of the routed experts.
        expert_norms_LE: L2 norm of each routed expert's gradients, float64 [layers, E].
        applied: False if a loss or gradient was not finite; weights and optimizer are then unchanged.
        stop: whether any rank wants to stop.
    """

    norm: float
    shared_norm: float
    expert_norms_LE: Tensor
    applied: bool
    stop: bool


class Engine:
    """A DeepSpeed engine around a network. Call it, then `step`, once per micro-batch.

    Args:
        model: the network; its parameters carry `Marks`. A network with experts has an attribute ``moe_layers``.
        config: the run's config.
        ep: which experts this rank holds; its process group is set here.
        norm: the library of the network's RMS norms, which is only reported.
        cp: which slab of each sample this rank has.

    Attributes:
        model: the network.
        moe_layers: the network's MoE layers, each holding this rank's experts.
        ep: the rank's expert-parallel group.
        cp: its context-parallel group.
        layout: how the ranks divide the work.
        load_E: number of this rank's tokens that each expert has had since `next_placement`, float64.
        optimizer: AdamW over DeepSpeed's parameter groups.
        optimizer_name, norm: the libraries that provide the optimizer and RMS norm kernels.
        device, dtype: device and dtype that batches must have.

    Raises:
        UserError: the DeepSpeed section or the optimizer does not fit.
    """

    def __init__(self, model: nn.Module, config: RunConfig, ep: ExpertParallel, norm: str, cp: ContextParallel = ALONE):
        world, rank, t = dist.get_world_size(), dist.get_rank(), config.training
        self.ep, self.cp, self.model, self.norm = ep, cp, model, norm
        self.layout = layout = Layout(world, ep.size, cp.size)
        self.moe_layers: list[MoE] = list(getattr(model, "moe_layers", []))
        self._experts = self.moe_layers[0].config.num_experts if self.moe_layers else 0
        self._placed_by_load = config.parallel.placement == "load" and ep.size > 1
        self._float64, self._bfloat16 = t.precision == "float64", t.precision == "bfloat16"
        self.dtype = torch.float64 if self._float64 else torch.float32
        self.model.to(self.dtype)
        for parameter in model.parameters():
            if marks(parameter).sharded:  # DeepSpeed has marks of its own for this
                parameter.allreduce = False  # type: ignore[attr-defined]
                parameter.group_name = group_name(layout)  # type: ignore[attr-defined]

        marker = ExpertParallelMarker(self._experts, ep, layout) if self.moe_layers else nn.Identity()
        module = _TrainedModule(self.model, marker, self.autocast)
        parameters = split_params_into_different_moe_groups_for_optimizer(_parameter_groups(module, t.weight_decay))
        self.optimizer_name = resolve_optimizer(t)
        self.optimizer = make_optimizer(self.optimizer_name, parameters, t)
        self._sharded = bool(config.parallel.zero_stage)
        settings = deepspeed_config(config, world, sum(parameter.numel() for parameter in module.parameters()))
        with self._deepspeed_precision():
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=settings)
        self.device = self._engine.device
        self._clip = t.grad_clip
        self.load_E = torch.zeros(self._experts, dtype=torch.float64, device=self.device)
        if self.moe_layers and not self._engine.has_moe_layers:
            raise RuntimeError("DeepSpeed did not recognise the experts: their gradients would be wrong")
        self._skip = False
        self._zero: Any = self._engine.optimizer if config.parallel.zero_stage else None
        if self._float64:
            self._communicate_float64()
        if self._zero:
            self._shards = shards_of_zero(self.model, self._zero)
            # This is how ZeRO skips a step; `_clipped` sets the flag before ZeRO reads it.
            self._zero.check_grad_overflow, self._zero.has_overflow = True, lambda partition_gradients=True: self._skip
        else:
            self._shards = shards_without_zero(self.model, rank, layout)
        make_state(self.optimizer)
        self._bad_losses = torch.zeros((), dtype=torch.float64, device=self.device)
        experts = {id(p): layer for layer, moe in enumerate(self.moe_layers) for p in moe.experts.parameters()}
        self._layer_of = {s.name: experts[id(s.parameter)] for s in self._shards if id(s.parameter) in experts}

    def __call__(self, *inputs: Any) -> Any:
        """Run the network's forward pass in ``training.precision``."""
        return self._engine(*inputs)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which calls of ``model`` itself use ``training.precision``."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._bfloat16)

    def step(self, loss: Tensor, learning_rate: float, stop: bool = False) -> Step | None:
        """Run the backward pass; after a step's last micro-batch also clip by the global norm and update (collective).

        The gradients are those of the mean loss over the step's micro-batches. The learning rate of a parameter is
        ``learning_rate`` times the ``lr_scale`` of its `Marks`.

        Args:
            loss: 0-d loss of one micro-batch.
            learning_rate: learning rate of this step.
            stop: tells the other ranks that this one wants to stop.

        Returns:
            None while gradients accumulate.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        last = self._engine.is_gradient_accumulation_boundary()
        self._bad_losses += ~loss.detach().isfinite()
        with self._deepspeed_precision():
            self._engine.backward(loss)
            step = self._clipped(stop) if last else None
            if step is not None and not step.applied and not self._zero:
                for parameter in self.model.parameters():
                    parameter.grad = None
            self._engine.step()
        return step

    def _clipped(self, stop: bool) -> Step:
        """Scale the gradients down to the clipping norm and return their norms."""
        gradients = self._gradients()
        layers, experts = len(self.moe_layers), self._experts
        squares = squared_norms(gradients, self._layer_of, layers, experts, self.ep)
        # One small reduction gives every rank the norms, the count of bad losses, and the count of stop requests.
        table = torch.cat([squares, self._bad_losses[None], sent_numbers([float(stop)], self.device, torch.float64)])
        self._bad_losses.zero_()
        dist.all_reduce(table)
        table = table.cpu()
        norms, bad_losses, stops = table[:-2].sqrt(), bool(table[-2]), bool(table[-1])
        norm = float(table[:-2].sum().sqrt())
        self._skip = not math.isfinite(norm) or bad_losses
        if not self._skip and norm > self._clip:
            for _, gradient in gradients:
                gradient.mul_(self._clip / norm)
        return Step(norm, float(norms[-1]), norms[:-1].view(layers, experts), not self._skip, stops)

    def _gradients(self) -> list[tuple[Shard, Tensor]]:
        """Return the reduced, flat gradient of every shard that has one."""
        found = []
        for shard in self._shards:
            gradient = shard.parameter.grad
            if self._zero:
                place = shard.parameter._index_in_param_group  # type: ignore[attr-defined]
                gradient = self._zero.averaged_gradients[shard.group][place]
            if gradient is not None:
                found.append((shard, gradient.view(-1)))
        return found

    @property
    def updates(self) -> int:
        """Number of optimizer updates so far, without skipped steps."""
        return updates(self.optimizer)

    def fragments(self) -> list[Fragment]:
        """Return what this rank saves. Over all ranks, every element of weights and moments occurs once."""
        buffers = self._buffers() if dist.get_rank() == 0 else []
        return fragments(self._shards, self.optimizer, self.ep, all_held=False) + buffers

    def shapes(self) -> dict[str, list[int]]:
        """Return the logical shapes of all tensors in a checkpoint."""
        buffers = {f"model/{name}": list(buffer.shape) for name, buffer in self._trained_buffers().items()}
        return logical_shapes(self.model, self.ep) | buffers

    def count_load(self, expert_N: Tensor) -> None:
        """Count the experts of a micro-batch's tokens for `next_placement`; never waits for the device."""
        if self._placed_by_load:
            self.load_E.index_add_(0, expert_N, torch.ones_like(expert_N, dtype=self.load_E.dtype))

    def next_placement(self) -> list[int] | None:
        """Return how the experts should be placed from now on by their load, and forget the load (collective).

        `load` carries it out, from a checkpoint that records it as ``placement``. The result is the present placement
        if no other is better, and None if placement does not follow the load.
        """
        if not self._placed_by_load:
            return None
        load_E = self.load_E.clone()
        dist.all_reduce(load_E)
        self.load_E.zero_()
        return place_experts(load_E.tolist(), self.ep.size, self.ep.placement) or self.ep.placement

    def load(self, reader: CheckpointReader) -> None:
        """Load weights and optimizer state from a checkpoint of any expert-parallel size and ZeRO stage.

        If placement follows the load, the experts are placed as the checkpoint says.
        """
        saved = reader.state
        follows = self._placed_by_load and saved.get("ep_size") == self.ep.size
        self.ep.placement = saved.get("placement") if follows else None
        reader.fill(self._held())
        set_updates(self.optimizer, reader.state["updates"])
        if self._zero:
            self._zero.update_lp_params()

    def load_weights(self, reader: CheckpointReader) -> None:
        """Load the weights only; the optimizer state stays that of a new run."""
        reader.fill([fragment for fragment in self._held() if fragment.name.startswith("model/")])
        if self._zero:
            self._zero.update_lp_params()

    def _held(self) -> list[Fragment]:
        """Return all that this rank holds of weights, moments and buffers."""
        return fragments(self._shards, self.optimizer, self.ep, all_held=True) + self._buffers()

    def _buffers(self) -> list[Fragment]:
        """Return the buffers that training changes, which are equal on all ranks."""
        return [Fragment(f"model/{name}", 0, buffer.view(-1)) for name, buffer in self._trained_buffers().items()]

    def _trained_buffers(self) -> dict[str, Tensor]:
        return self.model.trained_buffers() if isinstance(self.model, LatentTransformer) else {}

    def _deepspeed_precision(self) -> AbstractContextManager[None]:
        return in_float64(self._sharded) if self._float64 else nullcontext()

    def _communicate_float64(self) -> None:
        self._engine.communication_data_type = torch.float64
        if self._zero:
            self._zero.communication_data_type = torch.float64
            self._zero.ipg_buckets = {torch.float64: IPGBucket()}


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return one optimizer group for each combination of weight decay and learning rate scale in the `Marks`."""
    members: dict[tuple[str, float], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        kind = "decay" if marks(parameter).decay else "no_decay"
        members.setdefault((kind, marks(parameter).lr_scale), []).append(parameter)
    return [
        {
            "name": kind if scale == 1 else f"{kind} at {scale}",
            "params": parameters,
            "weight_decay": weight_decay if kind == "decay" else 0.0,
            "lr_scale": scale,
        }
        for (kind, scale), parameters in sorted(members.items(), key=lambda member: member[0])
    ]
