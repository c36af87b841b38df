"""Train an expert with the common trainer, on windows of its regimes, with a rollout loss and validation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shodh_moe.ccm.config import ExpertConfig
from shodh_moe.ccm.data import read_split
from shodh_moe.ccm.expert import expert_inputs, facts_of, make_network, units_of_start
from shodh_moe.ccm.windows import Scale, Windows
from shodh_moe.config.compare import flatten
from shodh_moe.data.sampler import DomainSampler
from shodh_moe.launching.watchdog import Watchdog
from shodh_moe.operators import nrmse, rollout
from shodh_moe.parallel import ExpertParallel
from shodh_moe.training.engine import Engine, Step
from shodh_moe.training.nonfinite import MicroBatch, NonFinite
from shodh_moe.training.process_group import init_distributed
from shodh_moe.training.resume import on_rank_0
from shodh_moe.training.trainer import train


def train_expert(
    config: ExpertConfig, run: Path, resume: str = "auto", watchdog: Watchdog | None = None
) -> None:  # fmt: skip
    """Train to ``training.steps``; arguments as in `trainer.train`.

    Raises:
        UserError: as in `trainer.train`; or the data or the anchor are missing or do not fit, or ranks disagree.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    init_distributed({f"config.{key}": value for key, value in flatten(config.model_dump()).items()})
    train(_ExpertTask(config, run), config, run, resume, watchdog)


class _InEngine:
    """Wrap an engine as the network that `rollout` calls; every step is a forward pass of the engine."""

    def __init__(self, engine: Engine, history: int):
        self._engine, self.history = engine, history

    def __call__(self, history_BTCHW: Tensor, condition: Tensor | None = None, /) -> Tensor:
        out: Tensor = self._engine(history_BTCHW, condition)
        return out


class _ExpertTask:
    """The `Task` of an expert."""

    name = "expert"

    def __init__(self, config: ExpertConfig, run: Path):
        family, folder, t = config.family.family(), config.family.folder(), config.training
        regimes = [regime for split in config.splits for regime in read_split(family, folder, split)]
        # Experts of one anchor use its units; otherwise their weights could not be merged.
        scale = on_rank_0(lambda: units_of_start(config)) if config.start else None
        scale = scale or Scale.of(regimes)
        self._config, self._family, self._scale = config, family, scale
        self._windows = Windows(regimes, scale, config.network.history + max(config.rollout))
        self._sampler = DomainSampler(self._windows.sizes, t.batch_size, config.seed, dist.get_world_size())
        self._valid = read_split(family, folder, "validation")
        network = make_network(config.network, len(family.channels), config.seed)
        self.engine = Engine(network, config, ExpertParallel(), "torch")
        self.facts, self.inputs = facts_of(scale, family.channels, folder.name), expert_inputs(config)
        self.tokens = t.batch_size
        self._network = _InEngine(self.engine, config.network.history)
        self._nonfinite = NonFinite(t.on_nonfinite, run, self._windows)
        self._batches: list[MicroBatch] = []
        self._unrolled = config.rollout[0]

    def check_start(self, state: dict[str, Any]) -> str | None:
        return None  # `units_of_start` has checked it

    def begin(self, step: int, logs: bool) -> None:
        lengths = self._config.rollout
        self._unrolled = lengths[(step - 1) * len(lengths) // self._config.training.steps]
        self._batches = []

    def losses(self, micro_batch: int) -> dict[str, Tensor]:
        engine, history = self.engine, self._config.network.history
        picks = self._sampler.batch(micro_batch, dist.get_rank())
        frames, coordinate, domain_B = self._windows.batch(picks)
        frames = frames.to(engine.device, engine.dtype, non_blocking=True)
        condition = coordinate.to(frames) if self._config.network.conditioned else None
        predicted = rollout(self._network, frames[:, :history], self._unrolled, condition)
        error_B = nrmse(predicted, frames[:, history : history + self._unrolled]).mean(1)
        losses = {"loss": error_B.mean()}
        kept = {key: value.detach() for key, value in losses.items()}
        self._batches.append(MicroBatch(picks, domain_B, error_B.detach(), kept, []))
        return losses

    def end(self, step: int, applied: bool) -> None:
        if applied:
            self._nonfinite.step_applied()
        else:
            self._nonfinite.handle(step, self._batches)

    def record(self, step: int, result: Step) -> dict[str, Any]:
        return {"rollout": self._unrolled}

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Mean nRMSE of full rollouts in physical units, by s of the validation regimes."""
        engine, config, history = self.engine, self._config, self._config.network.history
        engine.model.eval()
        rank, world, size = dist.get_rank(), dist.get_world_size(), config.training.batch_size
        sums = torch.zeros(len(self._valid), 2, dtype=torch.float64, device=engine.device)
        for number, regime in enumerate(self._valid):
            mine = regime.fields[rank::world]
            for fields in mine.split(size):
                fields = fields.to(engine.device, engine.dtype)
                condition = (
                    fields.new_full((len(fields),), regime.coordinate) if config.network.conditioned else None
                )  # fmt: skip
                frames = self._scale.normalise(fields[:, :history])
                with engine.autocast():
                    predicted = rollout(engine.model, frames, fields.shape[1] - history, condition)  # type: ignore[arg-type]
                errors = nrmse(self._scale.restore(predicted), fields[:, history:]).mean(1)
                sums[number, 0] += errors.sum()
                sums[number, 1] += len(fields)
        dist.all_reduce(sums)
        engine.model.train()
        means = (sums[:, 0] / sums[:, 1]).tolist()
        return {"rollout_nrmse": {f"{r.coordinate:+.3f}": v for r, v in zip(self._valid, means, strict=True)}}

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None: ...

    def finish(self, keep_going: Callable[[], bool]) -> bool:
        return True
