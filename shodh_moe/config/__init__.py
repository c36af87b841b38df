"""The configuration: its schema, reading it from YAML and overrides, comparing two, and the folders that it names."""

from shodh_moe.config.schema import (
    COMPRESSION,
    MAX_EXPERTS,
    MAX_ROUTING_WIDTH,
    Config,
    DataConfig,
    Domains,
    EvaluationConfig,
    ModelConfig,
    MoEConfig,
    ParallelConfig,
    RouterConfig,
    RunConfig,
    TelemetryConfig,
    TokenizerConfig,
    TrainingConfig,
)

__all__ = [
    "COMPRESSION",
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
