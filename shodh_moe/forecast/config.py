"""The config of the forecast benchmark."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from shodh_moe.base.section import Fraction, Name, NonNegativeFloat, PathText, Positive, PositiveFloat, Section, Seed
from shodh_moe.config import Config

OURS = "ours"
Rates = list[PositiveFloat]


class Peer(Section):
    """A network that predicts the change to the next snapshot from the last ones, on the grid of the data."""

    learning_rates: Rates = Field([1e-3, 2e-3, 4e-3], description="learning rates to try, in increasing order")
    batch_size: Positive = Field(4, description="samples per step, from all domains in equal numbers")
    weight_decay: NonNegativeFloat = 1e-4


class FNOPeer(Peer):
    """Fourier neural operator of the library neuraloperator."""

    width: Positive = 16
    modes: Positive = Field(8, description="kept wave numbers per axis, as `n_modes` of the library")
    layers: Positive = 4


class UNOPeer(Peer):
    """U-shaped neural operator of the library neuraloperator, with five layers that halve and double the grid."""

    width: Positive = 16
    modes: Positive = Field(8, description="kept wave numbers per axis of the outer layers; the inner ones have half")


class UNetPeer(Peer):
    """Plain U-Net, as in The Well's benchmark."""

    learning_rates: Rates = Field([5e-4, 1e-3, 2e-3], description="learning rates to try, in increasing order")
    width: Positive = Field(16, description="channels of the first level")
    levels: Positive = Field(4, description="number of times that the grid is halved")


class DPOTPeer(Peer):
    """Network in the style of DPOT."""

    learning_rates: Rates = Field([5e-4, 1e-3, 2e-3], description="learning rates to try, in increasing order")
    width: Positive = 128
    patch: Positive = Field(4, description="cells per side of a patch")
    blocks: Positive = 4
    heads: Positive = 4

    @model_validator(mode="after")
    def _heads(self) -> DPOTPeer:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        return self


class Peers(Section):
    """The networks to compare with; null leaves one out."""

    fno: FNOPeer | None = FNOPeer()
    uno: UNOPeer | None = UNOPeer()
    unet: UNetPeer | None = UNetPeer()
    dpot: DPOTPeer | None = DPOTPeer()

    def items(self) -> list[tuple[str, Peer]]:
        """The names and settings of the networks that take part."""
        named = [(name, getattr(self, name)) for name in type(self).model_fields]
        return [(name, peer) for name, peer in named if peer is not None]


class ForecastConfig(Section):
    """All settings of the forecast benchmark."""

    name: Name = "forecast"
    runs: PathText = Field("runs", description="folder that holds the benchmark's folder")
    seeds: list[Seed] = Field([0, 1, 2], description="seeds of weights and data order; the data are the same")
    seconds: PositiveFloat = Field(240.0, description="wall time of a training; for ours with tokenizer and encoding")
    trial_seconds: PositiveFloat = Field(60.0, description="wall time of a trial of a learning rate")
    tokenizer_share: Fraction = Field(
        0.55, description="share of `seconds` for our tokenizer and the encoding; our transformer has the rest"
    )
    learning_rates: Rates = Field([2e-3, 5e-3, 1e-2], description="learning rates to try for our transformer")
    base: Config = Field(Config(), description="our model and the data; steps and seeds are set by the benchmark")
    peers: Peers = Peers()
    steps: Positive = Field(10, description="snapshots to forecast")
    starts: Positive = Field(4, description="forecasts of each test trajectory, begun at evenly spaced snapshots")

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    def rates(self, model: str) -> list[float]:
        """The learning rates to try for a model."""
        return list(self.learning_rates if model == OURS else dict(self.peers.items())[model].learning_rates)

    @property
    def models(self) -> list[str]:
        """The names of all trained models, ours first."""
        return [OURS, *(name for name, _ in self.peers.items())]

    @property
    def history(self) -> int:
        """Number of snapshots that every model predicts the next one from."""
        return self.base.model.history

    @model_validator(mode="after")
    def _fits(self) -> ForecastConfig:
        base = self.base
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} must be one or more different numbers")
        trials = len(self.learning_rates)
        for model in self.models:
            rates = self.rates(model)
            if not rates or rates != sorted(set(rates)):
                raise ValueError(f"learning rates of {model} {rates} must be different numbers in increasing order")
            if len(rates) != trials:
                raise ValueError(
                    f"{model} has {len(rates)} learning rates to try and {OURS} {trials}: give all equally many trials"
                )
        if not 0 < self.tokenizer_share < 1:
            raise ValueError(f"tokenizer_share {self.tokenizer_share:g} must be above 0 and below 1")
        for key, given in (
            ("start", base.start),
            ("tokenizer.path", base.tokenizer.path),
            ("data.weights", base.data.weights),
            ("parallel.hostfile", base.parallel.hostfile),
        ):
            if given is not None:
                raise ValueError(f"base.{key} must be null: the benchmark trains everything itself, on this host")
        base.require_measured_stride_1("base")
        needed = self.history + self.steps
        if not base.data.path and base.data.snapshots < needed:
            raise ValueError(
                f"base.data.snapshots {base.data.snapshots} is too few for base.model.history {self.history} and a "
                f"forecast of {self.steps} steps: make it {needed} or more, or lower steps"
            )
        return self
