"""The config of a run: one pydantic model per section, the same for a laptop and a cluster.

A YAML file states only what differs from the defaults, and `load_config` adds ``key.sub=value`` overrides from the
command line. An unknown key or a value of the wrong type is a `UserError` that names the key, where it was written, and
the nearest valid key.
"""

from __future__ import annotations

from typing import Any, Protocol

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
