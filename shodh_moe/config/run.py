"""The config of a run: one pydantic model per section, the same for a laptop and a cluster.

A YAML file states only what differs from the defaults, and `load_config` adds ``key.sub=value`` overrides from the
command line. An unknown key or a value of the wrong type is a `UserError` that names the key, where it was written, and
the nearest valid key.
"""

from __future__ import annotations

from typing import Any, Protocol

from pydantic import model_validator

from shodh_moe.base.section import Name, PathText, Section, Seed, setting
from shodh_moe.config.data import DataConfig
from shodh_moe.config.finetune import FineTuningConfig
from shodh_moe.config.model import ModelConfig
from shodh_moe.config.tokenizer import TokenizerConfig
from shodh_moe.config.training import (
    DeepSpeedSettings,
    EvaluationConfig,
    ParallelConfig,
    TelemetryConfig,
    TrainingConfig,
)
from shodh_moe.config.window import Window


class RunConfig(Protocol):
    """The part of a config that the trainer and the launcher need for any kind of network."""

    @property
    def name(self) -> str: ...
    @property
    def runs(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def start(self) -> str | None: ...
    @property
    def training(self) -> TrainingConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def deepspeed(self) -> dict[str, Any]: ...
    def model_dump(self) -> dict[str, Any]: ...
    @classmethod
    def model_validate(cls, tree: Any, /) -> RunConfig: ...


class Config(Section):
    """Everything that a run of the latent transformer depends on."""

    name: Name = setting("quickstart", changes="nothing", description="name of the run folder")
    seed: Seed = setting(
        0, changes="tokenizer", description="seed of initial weights and data order of tokenizer and pretraining"
    )
    runs: PathText = setting("runs", changes="nothing", description="folder that holds the run folders")
    start: PathText | None = setting(
        None, changes="run", description="run or checkpoint to take initial weights from; null: random weights"
    )
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    finetune: FineTuningConfig | None = None
    telemetry: TelemetryConfig = TelemetryConfig()
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    deepspeed: DeepSpeedSettings = setting(
        {}, changes="nothing", description="merged into the DeepSpeed JSON that this config generates"
    )

    @property
    def samples_have_paths(self) -> bool:
        """Whether one decision gives all tokens of a sample the same expert in all layers, by the experts' scores.

        An expert that fine-tuning added has no score, so other ranks cannot compute the gate of its samples again.
        """
        moe = self.model.moe
        one = moe.scope == "path" and moe.router.context == "sample" and moe.top_k == 1
        return one and moe.num_experts > 0 and not moe.router.added

    @property
    def measured_stride(self) -> int:
        """Time stride of validation and evaluation."""
        return self.evaluation.stride or self.model.strides[0]

    def require_measured_stride_1(self, name: str) -> None:
        """Raise ``ValueError`` if validation and evaluation skip snapshots; ``name`` is this config's section."""
        if self.measured_stride != 1:
            raise ValueError(f"{name}.model.strides must begin with 1, and {name}.evaluation.stride be 1 or null")

    @property
    def windows(self) -> dict[str, Window]:
        """The longest sample of each split."""
        history, stride = self.model.history, self.measured_stride
        measured = Window(history, stride=stride, stride_key="evaluation.stride")
        train = Window(history, self.training.unroll, self.model.strides[-1])
        return {"train": train, "valid": measured, "test": measured}

    @model_validator(mode="after")
    def _check_stride(self) -> Config:
        if self.measured_stride not in self.model.strides:
            raise ValueError(
                f"evaluation.stride {self.measured_stride} is not among model.strides {self.model.strides}, with which "
                "the model is trained: choose one of them, or add it there"
            )
        return self

    @model_validator(mode="after")
    def _check_fine_tuning(self) -> Config:
        moe = self.model.moe
        if self.finetune and self.finetune.train == "paths" and (moe.scope == "layer" or not moe.num_experts):
            raise ValueError(
                "finetune.train paths needs a model with paths (model.moe.scope path and num_experts 1 or more): set "
                "it to all or lora"
            )
        return self

    @model_validator(mode="after")
    def _check_exchange(self) -> Config:
        if self.parallel.exchange == "sample" and not self.samples_have_paths:
            moe = self.model.moe
            reason = f"model.moe.router.context is {moe.router.context}: set it to sample, or exchange"
            if moe.router.added:
                reason = "fine-tuning has added experts (model.moe.router.added): use a model without, or set exchange"
            if moe.top_k > 1:
                reason = f"model.moe.top_k is {moe.top_k}: set it to 1, or exchange"
            if moe.scope != "path":
                reason = f"model.moe.scope is {moe.scope}: set it to path, or exchange"
            if not moe.num_experts:
                reason = "model.moe.num_experts is 0: give it experts, or set exchange"
            raise ValueError(f"parallel.exchange sample needs one path for each sample, but {reason} to auto")
        if self.parallel.placement == "load" and self.model.moe.scope != "path":
            raise ValueError(
                "parallel.placement load needs one router for all layers, but model.moe.scope is layer: set it to "
                "path, or placement to fixed"
            )
        return self
