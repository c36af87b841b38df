"""Pretraining of the latent mixture-of-experts transformer: its batches, losses, telemetry and validation.

``launch/pretrain.py`` starts it under the DeepSpeed launcher; any launcher that sets RANK, LOCAL_RANK and WORLD_SIZE
works, and without one it is a single process. The training loop is in `trainer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from shodh_moe.base.tensors import sent
from shodh_moe.config import Config
from shodh_moe.config.compare import differing_model_keys, flatten
from shodh_moe.config.inputs import Inputs
from shodh_moe.config.sizes import require_slabs
from shodh_moe.data.sampler import DomainSampler
from shodh_moe.launching.watchdog import Watchdog
from shodh_moe.metrics.latents import mse_beside_persistence
from shodh_moe.model import LatentTransformer
from shodh_moe.model.learning import prepare_fine_tuning, routers_learn
from shodh_moe.model.norm import available_norm
from shodh_moe.model.plan import moe_capacity
from shodh_moe.parallel import Exchange, ExpertParallel, SampleExchange, join_context
from shodh_moe.tokenizer.latents import (
    LatentSamples,
    inputs_of_latents,
    load_latents,
    require_boundaries,
    samples_of,
)
from shodh_moe.tokenizer.tokenizer import tokenizer_sha256
from shodh_moe.training.balance import update_biases
from shodh_moe.training.deepspeed_config import exchanges_samples, layout_of
from shodh_moe.training.draws import draw_noise, draw_strides
from shodh_moe.training.engine import Engine, Step
from shodh_moe.training.forward import forward
from shodh_moe.training.nonfinite import MicroBatch, NonFinite
from shodh_moe.training.process_group import init_distributed
from shodh_moe.training.router_start import start_router
from shodh_moe.training.telemetry import ExchangeCounts, RoutingCounts, Warnings, layer_records
from shodh_moe.training.trainer import train

ROUTING = "interval/routing/"


def pretrain(
    config: Config,
    run: Path,
    latents: Path,
    resume: str = "auto",
    tokenizer: Path | None = None,
    watchdog: Watchdog | None = None,
) -> None:
    """Pretrain the transformer up to ``training.steps``. See `trainer.train` for the other arguments and errors.

    Args:
        latents: folder of the latent cache.
        tokenizer: folder of the tokenizer that made the latents, whose hash checkpoints record; None if unknown.

    Raises:
        UserError: in addition, if the latents cannot be used or ranks differ in their configs or data.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    train_samples, valid = (
        samples_of(config, load_latents(latents, split, tokenizer), split) for split in ("train", "valid")
    )
    for samples in (train_samples, valid):
        require_boundaries(samples, config.model)
        require_slabs(samples.trajectories[0].z.shape[2:], config.model, config.parallel.context_size)
    init_distributed(_facts(config, train_samples, valid))
    inputs = inputs_of_latents(latents)
    made_with = tokenizer_sha256(tokenizer) if tokenizer else None
    task = LatentTask(config, train_samples, valid, run, {"tokenizer_sha256": made_with}, inputs)
    train(task, config, run, resume, watchdog)


def latent_engine(config: Config, latent_channels: int, samples: LatentSamples | None = None) -> Engine:
    """Build the engine around the config's transformer with this rank's experts (collective).

    Args:
        samples: training samples from which the path router's weights start; None: they start at random.
    """
    layout, rank = layout_of(config, dist.get_world_size()), dist.get_rank()
    ep, cp = ExpertParallel(layout.ep, layout.expert_rank(rank)), join_context(layout, rank)
    norm = available_norm(config.training.norm, get_accelerator().device_name())
    model = LatentTransformer(
        config.model, latent_channels, config.seed, ep,
        norm=norm, activation_checkpointing=config.training.activation_checkpointing, cp=cp,
    )  # fmt: skip
    if model.path is not None and config.finetune is None:  # a fine-tuning begins with a trained router
        experts, batch = config.model.moe.num_experts, config.training.batch_size
        if config.model.moe.router.context == "sample" and experts > batch and dist.get_rank() == 0:
            print(
                f"warning: model.moe.num_experts {experts} is more than the {batch} samples of a micro-batch, so some "
                "experts get no sample in a step: raise training.batch_size, or use fewer experts",
                flush=True,
            )
        # DeepSpeed broadcasts the initial weights of the first rank.
        if samples is not None and config.model.moe.router.start == "kmeans" and dist.get_rank() == 0:
            start_router(model, samples, config)
    if config.finetune:
        prepare_fine_tuning(model, config.finetune, ep)
    return Engine(model, config, ep, norm, cp)


class LatentTask:
    """`Task` of the latent transformer, with telemetry of its routers, experts and exchanges."""

    name = "pretrain"

    def __init__(
        self,
        config: Config,
        samples: LatentSamples,
        valid: LatentSamples,
        run: Path,
        facts: dict[str, Any],
        inputs: Inputs,
    ):
        _, channels, *grid = samples.trajectories[0].z.shape
        self.engine = latent_engine(config, channels, samples)
        self.facts, self.inputs = facts, inputs
        self._config, self._samples, self._valid = config, samples, valid
        by_domain = config.training.loss == "domain"
        self._scale_D = samples.change_scale().to(self.engine.device, self.engine.dtype) if by_domain else None
        self._sampler = DomainSampler(
            samples.sizes,
            config.training.batch_size,
            config.seed,
            self.engine.layout.batches,
            samples.weights,
            samples.streams,
        )
        self._layers = self.engine.moe_layers
        assert isinstance(self.engine.model, LatentTransformer)
        self._routers = self.engine.model.routers
        self._one_decision = self.engine.model.path is not None
        experts = config.model.moe.num_experts
        self._counts = RoutingCounts(len(self._layers), samples.domains, experts, self.engine.device)
        self._recorded = 0  # step of the last routing record
        self._warnings = Warnings(config.telemetry, config.model.moe.router.balance)
        self._nonfinite = NonFinite(config.training.on_nonfinite, run, samples)
        self._exchange_counts = ExchangeCounts()
        self._batches: list[MicroBatch] = []
        self._shares: list[SampleExchange] = []
        self._exchanges: list[Exchange] = []
        self._records = False
        self._slab = self.engine.cp.slab(grid[0])
        self.tokens = _tokens(config, list(grid))

    def check_start(self, state: dict[str, Any]) -> str | None:
        if differing := differing_model_keys(state["config"]["model"], self._config.model.model_dump()):
            return f"it is of another model, which differs in {', '.join(f'model.{key}' for key in differing)}"
        if state.get("tokenizer_sha256") != self.facts["tokenizer_sha256"]:
            return "it was trained on latents of another tokenizer: name that one with tokenizer.path"
        return None

    def begin(self, step: int, logs: bool) -> None:
        last = step == self._config.training.steps
        self._records = bool(self._layers) and logs and (step - self._recorded >= self._config.telemetry.every or last)
        self._batches, self._shares, self._exchanges = [], [], []
        self.engine.ep.exchanges = self._exchanges if self._records else None

    def losses(self, micro_batch: int) -> dict[str, Tensor]:
        picks = self._sampler.batch(micro_batch, self.engine.layout.batch_rank(dist.get_rank()))
        t, seed, samples = self._config.training, self._config.seed, self._samples
        step = micro_batch // t.accumulation
        batch = samples.batch(picks, draw_strides(samples, picks, seed, step), self._slab)
        batch = batch.to(self.engine.device, self.engine.dtype)
        noise = draw_noise(samples, picks, seed, step, self._slab) if t.history_noise else None
        noise = noise if noise is None else sent(noise, self.engine.device, self.engine.dtype)
        losses, routing, exchange = forward(self.engine, batch, self._config, self._scale_D, noise)
        named = losses._asdict()
        error_B = named.pop("error_B")
        kept = {key: value.detach() for key, value in named.items()}
        self._batches.append(MicroBatch(picks, batch.domain_B, error_B, kept, routing))
        if exchange is not None:
            self._shares.append(exchange)
        return named

    def end(self, step: int, applied: bool) -> None:
        self.engine.ep.exchanges = None
        if not applied:
            self._nonfinite.handle(step, self._batches)
            return
        self._nonfinite.step_applied()
        router = self._config.model.moe.router
        if self._layers and router.balance == "bias" and routers_learn(self._config.finetune):
            update_biases(self._routers, [batch.routing for batch in self._batches], router.bias_rate)
        for batch in self._batches:
            self._counts.add(batch.routing, batch.domain_B)
            if self._one_decision:
                self.engine.count_load(batch.routing[0].chosen_N.flatten())
        for exchange in self._shares:
            self._exchange_counts.add(exchange)

    def record(self, step: int, result: Step) -> dict[str, Any]:
        if not self._records:
            return {}
        routing = layer_records(self._counts, self._routers, self._exchanges, result.expert_norms_LE)
        found: dict[str, Any] = {"routing": routing}
        if exchanges_samples(self._config, self.engine.ep.size):
            found["sample_exchange"] = self._exchange_counts.record(self._exchanges, self.engine.device)
        self._recorded = step
        self._counts.clear()
        self._exchange_counts = ExchangeCounts()
        if dist.get_rank() == 0:
            decisions = routing[:1] if self._one_decision else routing
            for line in self._warnings.check(step, decisions):
                print(line, flush=True)
        return found

    def validate(self) -> dict[str, Any]:
        return validate(self.engine, self._valid, self._config)

    def state(self) -> dict[str, Tensor]:
        if not self._layers:
            return {}
        counts = {"table": self._counts.table_LDM.flatten(), "largest": self._counts.largest_L}
        counts |= {"exchange": self._exchange_counts.sums, "load": self.engine.load_E}
        return {ROUTING + name: value for name, value in (counts | {"told": torch.tensor([self._recorded])}).items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        mine = {name.removeprefix(ROUTING): value for name, value in state.items() if name.startswith(ROUTING)}
        if mine and mine["table"].numel() == self._counts.table_LDM.numel():
            self._counts.table_LDM.copy_(mine["table"].view_as(self._counts.table_LDM))
            self._counts.largest_L.copy_(mine["largest"])
            self._recorded = int(mine["told"])
            # Older checkpoints lack these.
            self._exchange_counts.sums.copy_(mine.get("exchange", self._exchange_counts.sums))
            self.engine.load_E.copy_(mine.get("load", self.engine.load_E))

    def finish(self, keep_going: Callable[[], bool]) -> bool:
        return True


def _tokens(config: Config, grid: list[int]) -> int:
    """Number of tokens in one rank's micro-batch."""
    return config.training.batch_size * math.prod(grid) // config.model.patch**3 // config.parallel.context_size


def _facts(config: Config, train: LatentSamples, valid: LatentSamples) -> dict[str, Any]:
    """Return facts that must be equal on all ranks; otherwise exchanges between them would hang or mix up tokens."""
    shape = list(train.trajectories[0].z.shape[1:])
    tokens = _tokens(config, shape[1:])
    moe = config.model.moe
    capacity = None if moe.dropless or not moe.num_experts else moe_capacity(moe, tokens)
    return {
        **flatten(config.model_dump()),
        "tokens of a micro-batch": tokens,
        "capacity of an expert": capacity,
        "shape of the latents": shape,
        "samples of the training latents by domain": dict(zip(train.domains, train.sizes, strict=True)),
        "samples of the validation latents by domain": dict(zip(valid.domains, valid.sizes, strict=True)),
    }


@torch.no_grad()
def validate(engine: Engine, valid: LatentSamples, config: Config) -> dict[str, dict[str, float]]:
    """Return the latent MSE of the model and of persistence, by domain, over the validation split (collective).

    The mean over the ranks of a CP group is that over the slabs of their samples.
    """
    layout, size = engine.layout, config.evaluation.batch_size
    rank, batches = layout.batch_rank(dist.get_rank()), layout.batches
    slab = engine.cp.slab(valid.trajectories[0].z.shape[2])
    engine.model.eval()
    totals = torch.zeros(len(valid.domains), 3, dtype=torch.float64, device=engine.device)
    everything = [(domain, i) for domain, count in enumerate(valid.sizes) for i in range(count)]
    # Every rank makes the same number of calls, because the all-to-all inside waits for all ranks.
    for first in range(0, len(everything), size * batches):
        mine = everything[first + rank * size : first + (rank + 1) * size]
        batch = valid.batch(mine or everything[:1], slab=slab).to(engine.device, engine.dtype)
        with engine.autocast():
            predicted = engine.model(*batch.inputs).latent_BCxyz
        errors_B2 = mse_beside_persistence(predicted, batch.history_BHCxyz, batch.target_BCxyz)
        if mine:
            rows = torch.cat([errors_B2, torch.ones_like(errors_B2[:, :1])], dim=1).double()
            totals.index_add_(0, batch.domain_B, rows)
    dist.all_reduce(totals)
    engine.model.train()
    means = (totals[:, :2] / totals[:, 2:]).tolist()
    return {
        "latent_mse": {domain: row[0] for domain, row in zip(valid.domains, means, strict=True)},
        "latent_mse_persistence": {domain: row[1] for domain, row in zip(valid.domains, means, strict=True)},
    }
