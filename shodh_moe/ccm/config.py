"""The config of an expert: a neural operator trained or fine-tuned on regimes of a family."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from shodh_moe.base.section import Fraction, Name, PathText, Positive, Section, Seed, setting
from shodh_moe.ccm.family_config import FamilyConfig, Split
from shodh_moe.config import ParallelConfig, TrainingConfig
from shodh_moe.config.training import DeepSpeedSettings
from shodh_moe.operators import DPOT_SIZES, FNO_SIZES, Coordinates


class NetworkConfig(Section, changes="model"):
    """The neural operator (see shodh_moe/operators)."""

    kind: Literal["fno", "dpot"] = "fno"
    size: str = Field("tiny", description="one of FNO_SIZES or DPOT_SIZES")
    history: Positive = Field(1, description="frames from which the network predicts the next one")
    coordinates: Coordinates = Field(
        "none", description="extra input channels that encode a cell's position: cells, or waves for a periodic domain"
    )
    padding: Fraction = Field(0.0, description="FNO: width of the zero padding, as a share of the domain's side")
    conditioned: bool = Field(False, description="the regime's coordinate s is an input of the network")

    @model_validator(mode="after")
    def _check_size(self) -> NetworkConfig:
        sizes = FNO_SIZES if self.kind == "fno" else DPOT_SIZES
        if self.size not in sizes:
            raise ValueError(f"{self.kind} has no size {self.size!r}: choose from {', '.join(sizes)}")
        if self.kind == "dpot" and self.padding:
            raise ValueError("padding is for fno: leave it out for dpot")
        return self

    @property
    def label(self) -> str:
        """The network in a few words: ``FNO 24/10`` (width/modes), ``DPOT tiny``."""
        if self.kind == "dpot":
            return f"DPOT {self.size}"
        return f"FNO {FNO_SIZES[self.size].width}/{FNO_SIZES[self.size].modes}"


class ExpertConfig(Section):
    """Everything that an expert's run depends on."""

    name: Name = setting("expert", changes="nothing", description="name of the run folder")
    seed: Seed = setting(0, changes="run", description="seed of initial weights and data order")
    runs: PathText = setting("runs", changes="nothing", description="folder that holds the run folders")
    start: PathText | None = setting(
        None, changes="run", description="the anchor, a run or checkpoint to fine-tune; null: train from scratch"
    )
    family: FamilyConfig = FamilyConfig()
    splits: list[Split] = setting(
        ["support"], changes="run", description="splits of the family to train on, with equal shares of their regimes"
    )
    rollout: list[Positive] = setting(
        [1, 2, 4],
        changes="run",
        description="numbers of steps that the loss spans; training is divided equally over the entries",
    )
    network: NetworkConfig = NetworkConfig()
    training: TrainingConfig = TrainingConfig()
    parallel: ParallelConfig = ParallelConfig()
    deepspeed: DeepSpeedSettings = setting(
        {}, changes="nothing", description="merged into the DeepSpeed JSON that this config generates"
    )

    @model_validator(mode="after")
    def _check_lists(self) -> ExpertConfig:
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise ValueError(f"splits {self.splits} must be one or more different splits")
        if (slabs := self.parallel.context_size) > 1:
            raise ValueError(f"parallel.context_size {slabs}: every rank has whole fields here: set it to 1")
        if not self.rollout:
            raise ValueError("rollout must have one or more numbers of steps")
        frames = self.network.history + max(self.rollout)
        if frames > self.family.snapshots:
            raise ValueError(
                f"network.history {self.network.history} and rollout {max(self.rollout)} need {frames} snapshots, but "
                f"family.snapshots is {self.family.snapshots}: change one of them"
            )
        return self
