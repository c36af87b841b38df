"""The tokenizer's training task, data-parallel: its batches, losses, validation and statistics.

The ranks split every batch, so the tokenizer does not depend on their number, except for rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import atomic_file
from shodh_moe.base.parameters import mark
from shodh_moe.base.tensors import save_tensors
from shodh_moe.config import Config
from shodh_moe.config.compare import flatten
from shodh_moe.config.inputs import Inputs
from shodh_moe.data import FieldStats, list_trajectories
from shodh_moe.data.loader import Snapshots
from shodh_moe.data.sampler import DomainSampler, domain_weights
from shodh_moe.launching.watchdog import Watchdog
from shodh_moe.parallel import ExpertParallel
from shodh_moe.tokenizer.batches import draw, drawn_batches, on_device, share
from shodh_moe.tokenizer.reconstruction import Reconstruction
from shodh_moe.tokenizer.start import SCALES, STARTED, start_from_principal_components
from shodh_moe.tokenizer.tokenizer import Tokenizer
from shodh_moe.training.engine import Engine, Step
from shodh_moe.training.nonfinite import MicroBatch, NonFinite
from shodh_moe.training.process_group import init_distributed
from shodh_moe.training.resume import on_rank_0
from shodh_moe.training.trainer import train

VALID_SAMPLES = 64  # per domain


def train_tokenizer(
    config: Config,
    dataset: Path,
    folder: Path,
    resume: str = "auto",
    watchdog: Watchdog | None = None,
    inputs: Inputs | None = None,
) -> None:
    """Train a tokenizer up to ``tokenizer.steps``.

    The folder gets the contents of a run folder, and at the end ``tokenizer.safetensors`` and ``tokenizer.json``. See
    `trainer.train` for the other arguments and errors.

    Args:
        config: from `tokenizer_run`.
        dataset: folder of the dataset.
        folder: folder of the tokenizer, visible to all ranks.
        inputs: what the training depends on, see `tokenizer_inputs`; None: not recorded. Needed on rank 0 only.

    Raises:
        UserError: in addition, if the data cannot be used or ranks differ in their configs.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    init_distributed(flatten(config.model_dump()))
    data, sampler = on_rank_0(lambda: _list_data(config, dataset))
    train_samples, valid = (DescribedSnapshots(records) for records in data)
    tokenizer = started_tokenizer(config, train_samples, dataset, folder)
    task = TokenizerTask(config, tokenizer, train_samples, valid, sampler, folder, inputs or {})
    train(task, config, folder, resume, watchdog)


def _list_data(config: Config, dataset: Path) -> tuple[list[list[Any]], DomainSampler | None]:
    """Return the trajectories for training and for validation, and the sampler that mixes their domains."""
    data = config.data
    found = [list_trajectories(dataset, split, data.grid, data.skip_bad) for split in ("train", "valid")]
    samples = Snapshots(found[0])
    weights = domain_weights(data.weights, samples.domains)
    batch = config.tokenizer.batch_size
    return found, None if weights is None else DomainSampler(samples.sizes, batch, config.seed, weights=weights)


def started_tokenizer(config: Config, samples: Snapshots, dataset: Path, folder: Path) -> Tokenizer:
    """Return the tokenizer before its first step, equal on all ranks, on this rank's device (collective).

    Values derived from the data are stored in ``start.safetensors``, because checkpoints hold only parameters.

    Raises:
        UserError: on rank 0, if that file is damaged or the dataset has no statistics; the other ranks exit silently.
    """
    torch.manual_seed(config.seed)
    tokenizer = Tokenizer(config.tokenizer, config.data.grid)
    tokenizer.encoder.checkpointing = tokenizer.decoder.checkpointing = config.tokenizer.activation_checkpointing
    tokenizer.to(get_accelerator().device_name(int(os.environ["LOCAL_RANK"])))
    state = tokenizer.state_dict()
    start = {name: state[name] for name in (*SCALES, *STARTED)}
    path = folder / "start.safetensors"
    if not on_rank_0(lambda: _read_start(path, start)):
        scales = on_rank_0(lambda: FieldStats.load(dataset))
        tokenizer.velocity_rms.fill_(scales.velocity_rms)
        tokenizer.pressure_rms.fill_(scales.pressure_rms)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        start_from_principal_components(tokenizer, samples, config.seed, rank, ranks, dist.all_reduce)
        on_rank_0(lambda: _write_start(path, start))
    for tensor in start.values():  # bitwise equal on all ranks
        dist.broadcast(tensor, 0)
    return tokenizer


def _read_start(path: Path, start: dict[str, Tensor]) -> bool:
    """Fill the tensors from ``start.safetensors``; return whether the file exists."""
    if not path.exists():
        return False
    try:
        stored = load_file(path)
        for name, tensor in start.items():
            tensor.copy_(stored[name])
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} is damaged: delete {path.parent} to train this tokenizer from the start") from error
    return True


def _write_start(path: Path, start: dict[str, Tensor]) -> None:
    with atomic_file(path) as temporary:
        save_tensors(start, temporary)


def set_learning_rate_scales(tokenizer: nn.Module) -> None:
    """Scale each weight's learning rate by 16 / sqrt(fan-in).

    Adam moves every entry by the same amount, so the same step moves a layer's output further the more inputs it sums.
    """
    for parameter in tokenizer.parameters():
        if parameter.dim() > 1:
            mark(parameter, lr_scale=16 / parameter[0].numel() ** 0.5)


class DescribedSnapshots(Snapshots):
    """Snapshots that can be described in reports."""

    def describe(self, domain: int, index: int) -> dict[str, Any]:
        """Locate a snapshot, given its index among all snapshots, and check whether its values are finite."""
        number, snapshot = self._find(index)
        record = self.records[number]
        fields = self.batch([index])
        return {
            "domain": self.domains[domain],
            "file": record.path.name,
            "trajectory": record.sample,
            "first_snapshot": snapshot,
            "finite": bool(fields.isfinite().all()),
        }


class TokenizerTask:
    """The tokenizer's `Task`."""

    name = "train tokenizer"

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        samples: DescribedSnapshots,
        valid: DescribedSnapshots,
        sampler: DomainSampler | None,
        folder: Path,
        inputs: Inputs,
    ):
        set_learning_rate_scales(tokenizer)
        self._errors = Reconstruction(tokenizer)
        self.engine = Engine(self._errors, config, ExpertParallel(), "torch")
        self.facts: dict[str, Any] = {}
        self.inputs = inputs
        self.tokens = config.training.batch_size
        self._config, self._tokenizer, self._folder = config, tokenizer, folder
        self._samples, self._valid, self._sampler = samples, valid, sampler
        self._nonfinite = NonFinite(config.training.on_nonfinite, folder, samples, "tokenizer.learning_rate")
        self._batches: Iterator[tuple[list[int], Tensor]] | None = None
        self._seen: list[MicroBatch] = []

    def check_start(self, state: dict[str, Any]) -> str | None:
        return None  # a tokenizer never starts from other weights

    def begin(self, step: int, logs: bool) -> None:
        self._seen = []

    def losses(self, micro_batch: int) -> dict[str, Tensor]:
        if self._batches is None:
            self._batches = self._batches_from(micro_batch)
        picks, fields = next(self._batches)
        errors = self.engine(fields)
        losses = dict(zip(self._errors.names, errors.mean(1), strict=True))
        loss_B = (3 * errors[0] + errors[1]) / 4
        loss = loss_B.mean()
        if len(errors) > 2:
            loss = loss + self._config.tokenizer.divergence_weight * losses["divergence_mse"]
        losses = {"loss": loss, **losses}
        kept = {key: value.detach() for key, value in losses.items()}
        domain_B = self._samples.labels(picks)
        named = list(zip(domain_B.tolist(), picks, strict=True))
        self._seen = [MicroBatch(named, domain_B, loss_B.detach(), kept, [])]
        return losses

    def _batches_from(self, step: int) -> Iterator[tuple[list[int], Tensor]]:
        """Yield this rank's part of the batches of the remaining steps."""
        c, seed, rank, ranks = self._config.tokenizer, self._config.seed, dist.get_rank(), dist.get_world_size()
        draws = (draw(self._samples, self._sampler, c.batch_size, seed, number) for number in range(step, c.steps))
        parts = (share(whole, rank, ranks) for whole in draws)
        return drawn_batches(self._samples, parts, self.engine.device)

    def end(self, step: int, applied: bool) -> None:
        if applied:
            self._nonfinite.step_applied()
        else:
            self._nonfinite.handle(step, self._seen)

    def record(self, step: int, result: Step) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def validate(self) -> dict[str, Any]:
        """Return reconstruction errors by domain, over about `VALID_SAMPLES` evenly spaced snapshots of each."""
        engine, valid, names = self.engine, self._valid, self._errors.names
        sums = torch.zeros(len(valid.domains), len(names) + 1, dtype=torch.float64, device=engine.device)
        parts = []
        for number in range(len(valid.domains)):
            picks = valid.of_domain(number)
            picks = picks[:: max(len(picks) // VALID_SAMPLES, 1)]
            parts += [(number, part) for part in _parts(picks, self.tokens)]
        mine = parts[dist.get_rank() :: dist.get_world_size()]
        batches = on_device(valid, [picks for _, picks in mine], engine.device)
        for (number, picks), fields in zip(mine, batches, strict=True):
            with engine.autocast():
                sums[number, :-1] += engine.model(fields).double().sum(1)
            sums[number, -1] += len(picks)
        dist.all_reduce(sums)
        means = (sums[:, :-1] / sums[:, -1:]).T.tolist()
        return {name: dict(zip(valid.domains, row, strict=True)) for name, row in zip(names, means, strict=True)}

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None: ...

    def finish(self, keep_going: Callable[[], bool]) -> bool:
        """Set the statistics of the latents and save the tokenizer, which marks it as trained."""
        if not set_latent_statistics(self._tokenizer, self._samples, self.tokens, keep_going):
            return False
        on_rank_0(self._save)
        return True

    def _save(self) -> None:
        # A copy with its own memory: ZeRO keeps the parameters in a common buffer.
        tokenizer = Tokenizer(self._config.tokenizer, self._config.data.grid)
        tokenizer.load_state_dict(self._tokenizer.state_dict())
        tokenizer.save(self._folder, self.inputs)


@torch.no_grad()
def set_latent_statistics(tokenizer: Tokenizer, samples: Snapshots, batch: int, keep_going: Callable[[], bool]) -> bool:
    """Set the per-channel mean and standard deviation of the raw latents of all samples (collective).

    The latents are float32, as in `encode_dataset`, and the sums float64. ``keep_going`` is called after every batch;
    as soon as it returns False, so does this function.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    channels, device = tokenizer.config.latent_channels, tokenizer.velocity_rms.device
    sums = torch.zeros(2 * channels + 1, dtype=torch.float64, device=device)
    parts = _parts(range(len(samples)), batch)
    batches = on_device(samples, parts[rank::ranks], device)
    for _ in range(0, len(parts), ranks):
        for fields in islice(batches, 1):  # in the last round a rank may have no batch
            z = tokenizer.encode_raw(fields)[0].double().transpose(0, 1).flatten(1)
            sums[:-1] += torch.cat([z.sum(1), z.square().sum(1)])
            sums[-1] += z.shape[1]
        if not keep_going():
            return False
    dist.all_reduce(sums)
    mean, square = (sums[:-1] / sums[-1]).split(channels)
    tokenizer.latent_mean_C.copy_(mean)
    tokenizer.latent_std_C.copy_((square - mean.square()).clamp(min=0).sqrt().clamp(min=1e-6))
    return True


def _parts(picks: Any, size: int) -> list[list[int]]:
    """Split a sequence of indices into consecutive parts of at most ``size``."""
    return [list(picks[first : first + size]) for first in range(0, len(picks), size)]
