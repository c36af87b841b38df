"""The config of the benchmark: data, network and the two training phases of each family."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from shodh_moe.base.section import Name, PathText, Positive, PositiveFloat, Section, Seed
from shodh_moe.ccm.bench.variants import Variant, own_experts
from shodh_moe.ccm.config import ExpertConfig, NetworkConfig
from shodh_moe.ccm.family_config import FamilyConfig, Split
from shodh_moe.config import ParallelConfig, TrainingConfig

EXPERTS = ("anchor", "low", "high", "conditioned")


class Phase(Section):
    """One training phase: that of the anchor, or the fine-tuning of the endpoint experts."""

    rollout: list[Positive] = Field([1, 1, 2, 3], description="see rollout in an expert's config")
    training: TrainingConfig = TrainingConfig()


class FineTuning(Section):
    """The baseline that fine-tunes the anchor on the first K frames of a regime."""

    steps: Positive = 40
    batch_size: Positive = 16
    learning_rates: list[PositiveFloat] = Field(
        [1e-3, 3e-3, 1e-2], description="rates to try; the best on validation regimes is used"
    )


class FamilyBench(Section):
    """The benchmark of one family."""

    family: FamilyConfig
    network: NetworkConfig = NetworkConfig()
    anchor: Phase = Phase()
    endpoint: Phase = Phase()
    frames: Positive = Field(4, description="K, the number of given frames; errors are those of the later frames")
    fine_tuning: FineTuning = FineTuning()
    variants: dict[Name, Variant] = Field({}, description="further rows, each with one change, in a table of their own")

    @model_validator(mode="after")
    def _variants(self) -> FamilyBench:
        for name, variant in self.variants.items():
            if variant.frames and not self.network.history < variant.frames < self.family.snapshots:
                raise ValueError(
                    f"variants.{name}.frames {variant.frames} must be more than network.history {self.network.history} "
                    f"and less than family.snapshots {self.family.snapshots}"
                )
            if variant.generates and self.family.source:
                raise ValueError(
                    f"variants.{name} needs regimes that must be generated, but the family has a source: leave it out"
                )
            if variant.anchor and not (variant.anchor.source or self.family.source):
                theirs, ours = (one.family().channels for one in (variant.anchor, self.family))
                if len(theirs) != len(ours):
                    raise ValueError(
                        f"variants.{name}.anchor has {len(theirs)} channels, but {self.family.name} has {len(ours)}: "
                        "choose a family with as many"
                    )
        ood: tuple[Split, ...] = ("ood_low", "ood_high")
        given = self.family.values if self.family.source else self.family.family().coordinates
        if self.variants and not any(given.get(split) for split in ood):
            raise ValueError(
                "variants are measured on ood_low and ood_high, of which the family has no regimes: add some"
            )
        if "unchanged" in self.variants:
            raise ValueError("variants.unchanged is the row of the family itself: choose another name")
        return self

    @model_validator(mode="after")
    def _frames(self) -> FamilyBench:
        if not self.network.history < self.frames < self.family.snapshots:
            raise ValueError(
                f"frames {self.frames} must be more than network.history {self.network.history} and less than "
                f"family.snapshots {self.family.snapshots}"
            )
        return self


class BenchConfig(Section):
    """All settings of the benchmark."""

    name: Name = "ccm"
    runs: PathText = Field("runs", description="folder that holds the benchmark's folder")
    seeds: list[Seed] = Field([0, 1, 2], description="seeds of weights and data order; the data are the same")
    jobs: Positive | Literal["auto"] = Field(
        "auto", description="concurrent trainings; auto: one per GPU, or one per core"
    )
    families: dict[Name, FamilyBench]

    @model_validator(mode="after")
    def _some(self) -> BenchConfig:
        if not self.families or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("the benchmark needs one or more families, and one or more different seeds")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    def expert(self, key: str, seed: int, role: str) -> ExpertConfig:
        """The config of an expert of the family ``key``; ``role`` is one of `EXPERTS`.

        The conditioned network gets the data and the training steps of the other three together.
        """
        one = self.families[key]
        runs, training = self.folder / "experts", one.anchor.training
        splits: list[Split] = ["support"]
        phase, network, start = one.anchor, one.network, None
        if role in ("low", "high"):
            phase, start = one.endpoint, str(runs / expert_name(key, seed, "anchor"))
            training = phase.training
            splits = ["endpoint_low"] if role == "low" else ["endpoint_high"]
        elif role == "conditioned":
            splits = ["support", "endpoint_low", "endpoint_high"]
            steps = one.anchor.training.steps + 2 * one.endpoint.training.steps
            training = training.model_copy(update={"steps": steps})
            network = network.model_copy(update={"conditioned": True})
        return ExpertConfig(
            name=expert_name(key, seed, role),
            seed=seed,
            runs=str(runs),
            start=start,
            family=one.family,
            splits=splits,
            rollout=phase.rollout,
            network=network,
            training=training,
            parallel=ParallelConfig(processes=1),
        )

    def experts_of_variant(self, key: str, seed: int, variant: Variant) -> dict[str, ExpertConfig]:
        """The experts that a variant is measured with: ``base_anchor``, ``low``, ``high``, and `own_experts`."""
        base = {role: self.expert(key, seed, role) for role in ("anchor", "low", "high")}
        return {"base_anchor": base["anchor"], **base, **own_experts(variant, base)}


def checkpoint_of_last_step(expert: ExpertConfig) -> Path:
    """Path of an expert's last checkpoint, whether or not it exists yet."""
    return Path(expert.runs) / expert.name / "checkpoints" / str(expert.training.steps)


def expert_name(key: str, seed: int, role: str) -> str:
    """Name of an expert's run folder."""
    return f"{key}-{seed}-{role}"
