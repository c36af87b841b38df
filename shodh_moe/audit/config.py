"""The config of the audit: the base run that all arms vary, seeds, learning rates and measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from shodh_moe.base.section import Name, PathText, Positive, PositiveFloat, Section, Seed
from shodh_moe.config import Config, Domains


class AuditConfig(Section):
    """All settings of the audit.

    There are five sets of runs: ``main``, the two main domains with every arm; ``long``, the same domains with more
    steps; ``hard``, two domains that are hard to tell apart; ``four``, all domains but those of ``bed`` alone, with
    several numbers of experts; ``bed``, the main domains and one whose samples contain both kinds of flow.
    """

    name: Name = "audit"
    runs: PathText = Field("runs", description="folder that holds the audit's folder")
    seeds: list[Seed] = Field(
        [0, 1, 2, 3, 4], description="seeds of the sets `main` and `long`, for weights and data order"
    )
    more_seeds: list[Seed] = Field([0, 1, 2], description="seeds of controls, of the other sets and of relearning")
    tuning_seeds: list[Seed] = Field(
        [1000, 1001, 1002], description="seeds of the runs for choosing learning rates; not used otherwise"
    )
    learning_rates: list[PositiveFloat] = Field(
        [5e-4, 1e-3, 2e-3, 4e-3],
        description="learning rates to try, in increasing order; each arm uses the best on validation data, mean over "
        "tuning_seeds",
    )
    domains: list[Name] = Field(["open_channel", "porous_media"], description="the two main domains")
    third: Name = Field("decaying_turbulence", description="domain that the trained networks learn afterwards")
    long_steps: Positive | None = Field(
        None, description="training steps in the set `long`, at the rates chosen for `main`; null to leave it out"
    )
    hard: list[Name] = Field(
        ["open_channel", "obstacle_wake"], description="two similar domains; [] to leave out the set `hard`"
    )
    experts: list[Positive] = Field([2, 4, 8], description="numbers of experts in the set `four`; [] to leave it out")
    bed: list[Name] = Field([], description="domains of the set `bed`; [] to leave it out")
    relearning_steps: Positive = Field(300, description="training steps on the third domain")
    gradient_samples: Positive = Field(16, description="samples per domain for comparing gradients")
    probes: Positive = Field(5, description="checkpoints during training at which gradients are compared")
    jobs: Positive | Literal["auto"] = Field("auto", description="concurrent runs; auto: one per GPU, or one per core")
    base: Config = Field(
        Config(), description="config of the mixture arm, with the data of all domains; other arms vary it"
    )
    unseen: Domains = Field(
        Domains(), description="domains with geometry unseen in training, of which the test split is measured"
    )

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    @property
    def all_domains(self) -> list[str]:
        """All domains of the data, sorted."""
        return sorted(name for name, _ in self.base.data.domains.items())

    @model_validator(mode="after")
    def _seeds(self) -> AuditConfig:
        for key in ("seeds", "more_seeds", "tuning_seeds", "learning_rates"):
            values = getattr(self, key)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{key} {values} must be one or more different numbers")
        if self.learning_rates != sorted(self.learning_rates):
            raise ValueError(f"learning_rates {self.learning_rates} must be in increasing order")
        if self.experts != sorted(set(self.experts)) or min(self.experts, default=2) < 2:
            raise ValueError(f"experts {self.experts} must be different numbers, at least 2, in increasing order")
        if more := sorted(set(self.more_seeds) - set(self.seeds)):
            raise ValueError(f"more_seeds: {more[0]} is not among seeds, from whose runs relearning starts: add it")
        if both := sorted(set(self.tuning_seeds) & set(self.seeds)):
            raise ValueError(f"tuning_seeds: {both[0]} is also among seeds: give seeds used only for choosing rates")
        return self

    @model_validator(mode="after")
    def _domains(self) -> AuditConfig:
        for key, names in (("domains", self.domains), ("hard", self.hard)):
            if len(set(names)) != 2 and not (key == "hard" and not names):
                raise ValueError(f"{key} {names} must be two different domains")
        if self.bed and not set(self.domains) < set(self.bed):
            raise ValueError(f"bed {self.bed} must be the main domains {self.domains} and at least one more")
        for key, names in (
            ("domains", self.domains),
            ("hard", self.hard),
            ("third", [self.third]),
            ("bed", self.bed),
        ):
            if missing := [name for name in names if name not in self.all_domains]:
                known = ", ".join(self.all_domains)
                raise ValueError(f"{key}: base.data.domains has {known} but not {missing[0]}: correct one of them")
        if self.third in self.domains:
            raise ValueError(f"third {self.third} is one of the main domains: choose one that is new to the networks")
        if missing := [name for name in self.domains if getattr(self.unseen, name) is None]:
            raise ValueError(f"unseen has no {missing[0]}: give both main domains geometry unseen in training")
        for name, domain in self.unseen.items():
            trained = getattr(self.base.data.domains, name)
            if trained is None:
                raise ValueError(f"unseen.{name}: base.data.domains has no {name}: leave it out (null)")
            if domain.identity() == trained.identity():
                raise ValueError(f"unseen.{name} is the same as in base.data.domains: give it another geometry")
        return self

    @model_validator(mode="after")
    def _base(self) -> AuditConfig:
        data, moe, batch = self.base.data, self.base.model.moe, self.base.training.batch_size
        for key, value in (("data.weights", data.weights), ("data.path", data.path), ("start", self.base.start)):
            if value is not None:
                raise ValueError(f"base.{key} must be null: the audit sets it for each run")
        self.base.require_measured_stride_1("base")
        if self.base.parallel.hostfile:
            raise ValueError("base.parallel.hostfile must be null: every run of the audit is one process on this host")
        bed_only = set(self.bed) - set(self.domains)
        for count in {2, len(set(self.all_domains) - bed_only), len(self.bed) or 2}:
            if batch % count:
                raise ValueError(f"base.training.batch_size {batch} is not divisible by {count} domains: change it")
        learns = moe.router.kind != "oracle" and not moe.router.frozen and moe.router.start == "kmeans"
        if moe.scope != "path" or moe.num_experts < 2 or not moe.shared_linear or not learns:
            raise ValueError(
                "base.model.moe must be the mixture that the other arms are derived from: scope path, num_experts 2 or "
                "more, shared_linear true, and a router that starts from kmeans and learns"
            )
        return self
