"""The config of the benchmark in three dimensions, and those of its runs and regimes.

One run trains a path mixture on all domains. Of each domain with an axis, experts are fine-tuned from it at both ends
of a physical range, and a control at the range's middle. Only what the domain's path has for itself is trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from shodh_moe.base.section import Name, NonNegative, PathText, Positive, PositiveFloat, Section, Seed
from shodh_moe.config import Config, Domains
from shodh_moe.config.finetune import FineTuningConfig
from shodh_moe.config.paths import resolve_paths, tokenizer_seed
from shodh_moe.merging.alpha import REACH
from shodh_moe.merging.axes import alpha_at

ROLES = ("continued", "low", "high")


class Axis(Section):
    """The physical range of one domain. The mixture is trained at the value that ``base`` gives the domain."""

    parameter: Name = Field(description="a key of the domain, such as viscosity or roughness")
    low: float = Field(description="where the experts are trained")
    high: float
    log: bool = Field(False, description="alpha is linear in the parameter's logarithm")
    validation: list[float] = Field(description="values on which the scale of alpha is chosen")
    test: list[float] = Field(description="values outside of the range on which errors are reported")

    @model_validator(mode="after")
    def _values(self) -> Axis:
        values = [self.low, self.high, *self.validation, *self.test]
        if not self.low < self.high or min(values) <= 0:
            raise ValueError(f"low {self.low:g} and high {self.high:g}: give 0 < low < high, and positive values")
        if not self.validation or not self.test or len(set(values)) < len(values):
            raise ValueError(
                f"validation {self.validation} and test {self.test} need one or more different values each"
            )
        if inside := [value for value in self.test if self.low < value < self.high]:
            raise ValueError(f"test {inside[0]:g} is between low and high: give values outside of them")
        if far := [value for value in self.test if abs(self.alpha(value)) > REACH + 1e-9]:
            raise ValueError(f"test {far[0]:g} is at alpha {self.alpha(far[0]):+.2f}, beyond CCM's reach of {REACH:g}")
        return self

    def alpha(self, value: float) -> float:
        """The coordinate of a value, -1 at ``low`` and 1 at ``high``."""
        return alpha_at(value, self.low, self.high, 0 if self.log else 1)


class Tuning(Section):
    """The fine-tuning of experts and control."""

    steps: Positive = 200
    batch_size: Positive = 8
    learning_rate: PositiveFloat = 2e-3
    warmup_steps: NonNegative = 10


class Bench3dConfig(Section):
    """All settings of the benchmark in three dimensions."""

    name: Name = "ccm3d"
    runs: PathText = Field("runs", description="folder that holds the benchmark's folder")
    seeds: list[Seed] = Field([0, 1, 2], description="seeds of weights and data order; the data are the same")
    jobs: Positive | Literal["auto"] = Field("auto", description="concurrent trainings; auto: one per GPU or core")
    base: Config = Field(Config(), description="the path mixture, with all domains at the middle of their ranges")
    axes: dict[Name, Axis] = Field(description="for each domain that moves, its range")
    tuning: Tuning = Tuning()
    trajectories: Positive = Field(4, description="test trajectories of each held-out value")
    frames: Positive = Field(4, description="snapshots of each trajectory that the readout prefix sees")

    @model_validator(mode="after")
    def _fits(self) -> Bench3dConfig:
        data, model = self.base.data, self.base.model
        domains = dict(data.domains.items())
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or not self.axes:
            raise ValueError("the benchmark needs one or more different seeds, and one or more axes")
        if model.moe.scope != "path" or model.moe.num_experts < len(domains):
            raise ValueError("base.model.moe needs scope path, and an expert for each domain")
        for key, given in (("data.path", data.path), ("data.weights", data.weights), ("start", self.base.start)):
            if given is not None:
                raise ValueError(f"base.{key} must be null: the benchmark sets it for each run")
        self.base.require_measured_stride_1("base")
        for name, axis in self.axes.items():
            if name not in domains:
                raise ValueError(f"axes.{name}: base.data.domains has only {', '.join(domains)}")
            middle = getattr(domains[name], axis.parameter, None)
            if not isinstance(middle, float):
                raise ValueError(f"axes.{name}.parameter {axis.parameter} is no number of the domain {name}")
            if not axis.low < middle < axis.high:
                raise ValueError(
                    f"axes.{name}: the mixture is trained at {axis.parameter} {middle:g}, which is not between "
                    f"{axis.low:g} and {axis.high:g}: change base.data.domains.{name} or the range"
                )
            # Each value must be one that the domain accepts.
            for value in (axis.low, axis.high, *axis.validation, *axis.test):
                self._domains(name, value)
        if not model.history < self.frames < data.snapshots - 1:
            raise ValueError(
                f"frames {self.frames} must be more than base.model.history {model.history} and leave one or more of "
                f"base.data.snapshots {data.snapshots}"
            )
        return self

    @property
    def folder(self) -> Path:
        return Path(self.runs) / self.name

    def middle(self, domain: str) -> float:
        """The value at which the mixture is trained."""
        return float(getattr(getattr(self.base.data.domains, domain), self.axes[domain].parameter))

    def data_config(self) -> Config:
        """The config that makes the mixture's data and the tokenizer of all runs."""
        update = {"name": f"{self.name}-data", "runs": str(self.folder / "runs")}
        return self.base.model_copy(update={**update, "parallel": self._one_rank()})

    def mixture(self, seed: int) -> Config:
        """The run of the path mixture."""
        return self._run(f"mixture-{seed}", seed)

    def expert(self, domain: str, role: str, seed: int) -> Config:
        """The run of an expert at an end of a domain's range, or of the control at its middle (``continued``)."""
        axis, start = self.axes[domain], self.mixture(seed)
        value = {"low": axis.low, "high": axis.high, "continued": self.middle(domain)}[role]
        tuning = self.tuning.model_dump()
        training = {"min_learning_rate": 0.01 * self.tuning.learning_rate, "weight_decay": 0.0, **tuning}
        every = {"checkpoint_every": self.tuning.steps, "validate_every": self.tuning.steps}
        base = self._run(f"{domain}-{role}-{seed}", seed, f"{start.runs}/{start.name}")
        update = {
            "data": self._data(domain, value),
            "finetune": FineTuningConfig(train="paths"),
            "training": base.training.model_copy(update={**training, **every}),
        }
        return Config.model_validate({**base.model_dump(), **{key: one.model_dump() for key, one in update.items()}})

    def held_out(self, domain: str, value: float) -> Config:
        """The config of a held-out value's data and latents; only its test split is used."""
        base = self._run(f"{domain}-at-{value:g}", 0)
        few = {"train": 1, "valid": 1, "test": self.trajectories}
        data = self._data(domain, value, {"trajectories": few})
        # Beds, pores and eddies that no run has seen.
        data = data.model_copy(update={"seed": (data.seed + 1) % 2**64})
        tokenizer = base.tokenizer.model_copy(update={"latent_copies": 1})
        training = base.training.model_copy(update={"batch_size": 1})
        return base.model_copy(update={"data": data, "tokenizer": tokenizer, "training": training})

    def _run(self, name: str, seed: int, start: str | None = None) -> Config:
        base = self.data_config()
        # A path and a seed of its own make the tokenizer independent of a run's domains and seed.
        tokenizer = {"path": str(resolve_paths(base).tokenizer), "seed": tokenizer_seed(base)}
        update = {"name": name, "seed": seed, "start": start, "tokenizer": base.tokenizer.model_copy(update=tokenizer)}
        return base.model_copy(update=update)

    def _data(self, domain: str, value: float, changes: dict[str, Any] | None = None) -> Any:
        """The section ``data`` with one domain alone, at this value."""
        data = self.base.data
        update = {"name": f"{data.name}_{domain}_{value:g}", "domains": self._domains(domain, value, changes)}
        return data.model_copy(update=update)

    def _domains(self, domain: str, value: float, changes: dict[str, Any] | None = None) -> Domains:
        own = getattr(self.base.data.domains, domain).model_dump()
        others: dict[str, Any] = dict.fromkeys(Domains.model_fields)
        return Domains.model_validate(
            {**others, domain: {**own, self.axes[domain].parameter: value, **(changes or {})}}
        )

    def _one_rank(self) -> Any:
        return self.base.parallel.model_copy(update={"processes": 1, "ep_size": "auto", "context_size": 1})
