"""The config of an expert: a neural operator trained on regimes of a family, or fine-tuned there from another one."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from shodh_moe.base.section import Fraction, Name, NonNegative, Positive, Section
from shodh_moe.ccm.family import FAMILIES, Family
from shodh_moe.config import ParallelConfig, TrainingConfig
from shodh_moe.config.compare import fingerprint
from shodh_moe.operators import DPOT_SIZES, FNO_SIZES, Coordinates

Split = Literal["support", "endpoint_low", "endpoint_high", "validation", "interpolation", "ood_low", "ood_high"]


class FamilyConfig(Section):
    """Which data: one of the families (shodh_moe/ccm/family.py), generated under ``root`` where it is missing."""

    name: Literal["reaction_diffusion", "navier_stokes", "shallow_water", "dam_height"] = "reaction_diffusion"
    root: str = "data"
    grid: Positive = Field(48, description="cells a side")
    snapshots: Positive = Field(21, description="stored states of a trajectory")
    trajectories: dict[Split, Positive] = Field({}, description="of each regime of a split, in place of the family's")
    seed: NonNegative = 0

    def family(self) -> Family:
        """The family at this size."""
        own = FAMILIES[self.name]
        counts = own.trajectories | {str(split): count for split, count in self.trajectories.items()}
        return replace(own, grid=self.grid, snapshots=self.snapshots, trajectories=counts, seed=self.seed)

    def folder(self) -> Path:
        """Where its files are; another size or equation has another folder."""
        family = self.family()
        return Path(self.root) / f"ccm-{fingerprint(type(family.settings).__name__, asdict(family))}"


class NetworkConfig(Section):
    """The neural operator (shodh_moe/operators)."""

    kind: Literal["fno", "dpot"] = "fno"
    size: str = Field("tiny", description="one of FNO_SIZES or DPOT_SIZES")
    history: Positive = Field(1, description="frames that it sees before it predicts the next")
    coordinates: Coordinates = Field("none", description="how it sees where a cell is: cells, or waves if periodic")
    padding: Fraction = Field(0.0, description="FNO: zeros beside the domain, as a share of its side")
    conditioned: bool = Field(False, description="it is told the regime's coordinate s")

    @model_validator(mode="after")
    def _size(self) -> NetworkConfig:
        sizes = FNO_SIZES if self.kind == "fno" else DPOT_SIZES
        if self.size not in sizes:
            raise ValueError(f"{self.kind} has no size {self.size!r}: choose from {', '.join(sizes)}")
        if self.kind == "dpot" and self.padding:
            raise ValueError("padding is for fno: leave it out for dpot")
        return self


class ExpertConfig(Section):
    """Everything that an expert's run depends on."""

    name: Name = "expert"
    seed: NonNegative = Field(0, description="initial weights and data order")
    runs: str = Field("runs", description="folder that holds the run folders")
    start: str | None = Field(None, description="the anchor: a run or checkpoint to fine-tune from; null: from scratch")
    family: FamilyConfig = FamilyConfig()
    splits: list[Split] = Field(["support"], description="splits of the family to train on, their regimes equally")
    rollout: list[Positive] = Field(
        [1, 2, 4], description="steps that the loss goes through; the training is divided equally over the entries"
    )
    network: NetworkConfig = NetworkConfig()
    training: TrainingConfig = TrainingConfig()
    parallel: ParallelConfig = ParallelConfig()
    deepspeed: dict[str, Any] = Field({}, description="merged into the DeepSpeed JSON that this config generates")

    @model_validator(mode="after")
    def _lists(self) -> ExpertConfig:
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise ValueError(f"splits needs one or more different splits, not {self.splits}")
        if not self.rollout:
            raise ValueError("rollout needs one or more numbers of steps")
        frames = self.network.history + max(self.rollout)
        if frames > self.family.snapshots:
            raise ValueError(
                f"network.history {self.network.history} and rollout {max(self.rollout)} need {frames} snapshots, "
                f"family.snapshots is {self.family.snapshots}: change one of them"
            )
        return self
