"""The config of a run: its sections, reading it from YAML, comparing two configs, and the folders of its artefacts."""

from shodh_moe.config.data import DataConfig, Domains
from shodh_moe.config.model import MAX_CHOICES, MAX_EXPERTS, MAX_ROUTING_WIDTH, ModelConfig, MoEConfig, RouterConfig
from shodh_moe.config.run import Config, RunConfig
from shodh_moe.config.tokenizer import COMPRESSION, TokenizerConfig
from shodh_moe.config.training import EvaluationConfig, ParallelConfig, TelemetryConfig, TrainingConfig

__all__ = [
    "COMPRESSION",
    "MAX_CHOICES",
    "MAX_EXPERTS",
    "MAX_ROUTING_WIDTH",
    "Config",
    "DataConfig",
    "Domains",
    "EvaluationConfig",
    "MoEConfig",
    "ModelConfig",
    "ParallelConfig",
    "RouterConfig",
    "RunConfig",
    "TelemetryConfig",
    "TokenizerConfig",
    "TrainingConfig",
]
