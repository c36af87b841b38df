"""The sections ``training``, ``telemetry``, ``parallel`` and ``evaluation``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from shodh_moe.base.paths import expand
from shodh_moe.base.section import (
    Fraction,
    Name,
    NonNegative,
    NonNegativeFloat,
    PathText,
    Positive,
    PositiveFloat,
    Section,
    setting,
)
from shodh_moe.config.trackers import check_tracker

# Paths among DeepSpeed's settings, which it does not expand itself.
_DEEPSPEED_PATHS = (("tensorboard", "output_path"), ("csv_monitor", "output_path"), ("flops_profiler", "output_file"))


def _expand_paths(settings: dict[str, Any]) -> dict[str, Any]:
    for section, key in _DEEPSPEED_PATHS:
        inner = settings.get(section)
        if isinstance(inner, dict) and isinstance(inner.get(key), str):
            settings = {**settings, section: {**inner, key: expand(inner[key])}}
    return settings


DeepSpeedSettings = Annotated[dict[str, Any], AfterValidator(_expand_paths)]


class TrainingConfig(Section):
    """Pretraining: optimizer, schedule, and how often to write checkpoints and records."""

    steps: Positive = setting(400, changes="run", description="optimizer steps")
    batch_size: Positive = setting(16, changes="run", description="samples per micro-batch and rank (or context group)")
    accumulation: Positive = setting(1, changes="run", description="micro-batches per optimizer step")
    learning_rate: PositiveFloat = setting(1e-3, changes="run")
    min_learning_rate: NonNegativeFloat = setting(1e-5, changes="run", description="learning rate at the last step")
    warmup_steps: NonNegative = setting(20, changes="run")
    loss: Literal["mse", "domain", "sample", "relative"] = setting(
        "domain",
        changes="run",
        before="mse",
        description="latent error to minimise: its square; the same over the mean squared change of the sample's "
        "domain, or of the sample itself; or its L2 norm over that of the target",
    )
    unroll: Positive = setting(
        1,
        changes="run",
        description="predictions from each training sample, each made from those before it; the loss is their mean",
    )
    unroll_gradient: Literal["last", "through"] = setting(
        "last",
        changes="run",
        description="with unroll 2 or more, what the gradient of a prediction's loss passes through: that prediction "
        "alone (push-forward), or also those that it was made from (through time)",
    )
    history_noise: NonNegativeFloat = setting(
        0.0,
        changes="run",
        description="standard deviation of Gaussian noise on each training sample's history, as a share of the "
        "history's root mean square",
    )
    weight_decay: NonNegativeFloat = setting(0.05, changes="run")
    betas: list[Fraction] = setting([0.9, 0.95], changes="run")
    grad_clip: PositiveFloat = setting(1.0, changes="run", description="largest norm of the gradients")
    precision: Literal["float32", "bfloat16", "float64"] = setting(
        "float32",
        changes="run",
        description="precision of matrix products; bfloat16: autocast, weights and optimizer state stay float32",
    )
    optimizer: Literal["auto", "torch", "deepspeed", "apex"] = setting(
        "auto", changes="nothing", for_tokenizer=True, description="library of the AdamW kernel"
    )
    norm: Literal["auto", "torch", "apex"] = setting(
        "auto", changes="nothing", description="library of the RMS norm kernel"
    )
    activation_checkpointing: bool = setting(
        False, changes="nothing", description="recompute each block in the backward pass to save memory"
    )
    on_nonfinite: Literal["halt", "skip"] = setting(
        "halt",
        changes="nothing",
        for_tokenizer=True,
        description="what to do about a loss or gradient that is not finite: stop, or skip the step",
    )
    stall_seconds: NonNegativeFloat = setting(
        1800.0,
        changes="nothing",
        for_tokenizer=True,
        description="end the job when a rank makes no step for this long, and write stacks to the run folder; 0: never",
    )
    checkpoint_every: Positive = setting(100, changes="nothing", description="steps between checkpoints")
    keep_last: Positive = setting(2, changes="nothing", description="number of newest checkpoints to keep")
    keep_every: NonNegative = setting(
        0, changes="nothing", description="also keep every checkpoint at a multiple of this many steps; 0: none"
    )
    log_every: Positive = setting(10, changes="nothing", description="steps between records in metrics.jsonl")
    validate_every: Positive = setting(100, changes="nothing", description="steps between validations")

    @model_validator(mode="after")
    def _check_betas(self) -> TrainingConfig:
        if len(self.betas) != 2 or max(self.betas) >= 1:
            raise ValueError(f"betas needs two numbers from 0 to below 1, not {self.betas}")
        return self


class TelemetryConfig(Section, changes="nothing"):
    """Records of the routers, experts and exchanges of each layer."""

    every: Positive = Field(10, description="steps between records of the routers, experts and exchanges")
    starved_below: Fraction = Field(0.1, description="warn of an expert with less than this share of an even load")
    dropped_above: Fraction = Field(0.1, description="warn when more than this share of a domain's tokens is dropped")
    trackers: list[Annotated[str, BeforeValidator(check_tracker)]] = Field(
        ["tensorboard"],
        description="where the records of training go besides metrics.jsonl: tensorboard, csv, mlflow, wandb "
        "(docs/trackers.md)",
    )
    mlflow_uri: str | None = Field(
        None, description="MLflow's tracking URI; null: MLFLOW_TRACKING_URI if it is set, else a database in the run"
    )
    mlflow_experiment: Name = Field("shodh_moe", description="MLflow's experiment, made if it is missing")
    wandb_mode: Literal["auto", "online", "offline"] = Field(
        "auto",
        description="online sends to W&B, offline writes files to the run; auto: online with a key and a network",
    )
    wandb_project: Name = Field("shodh_moe", description="W&B's project, made if it is missing")


class ParallelConfig(Section, changes="nothing"):
    """Parallel layout: world size = EP x EDP x CP (DESIGN 7). A checkpoint fits every layout."""

    processes: Positive | Literal["auto"] = Field("auto", description="ranks on this host; auto: one per GPU, 2 on CPU")
    hostfile: PathText | None = Field(
        None, description="file of hosts and slots, in DeepSpeed's format; null: this host"
    )
    elastic: bool = Field(
        False,
        description="start again after a failure, on the hosts that still answer (docs/cluster.md)",
    )
    ep_size: Positive | Literal["auto"] = Field(
        "auto", description="ranks that share the experts; auto: the largest that divides world size and experts"
    )
    context_size: Positive = Field(
        1,
        description="ranks that share the tokens of each sample, as slabs of its latent grid; 1: whole samples",
    )
    exchange: Literal["sample", "token", "auto"] = Field(
        "auto",
        description="what ranks exchange: each sample once, before the embedding, with scope path and context sample; "
        "or tokens, twice in every layer; auto: samples where possible",
    )
    exchange_capacity: float = Field(
        1.25,
        ge=1,
        description="with exchange sample, the most samples that a rank computes, relative to an even share; the "
        "experts of samples beyond it are reached by an exchange of their tokens",
    )
    placement: Literal["fixed", "load"] = Field(
        "fixed",
        description="which rank holds which experts: in order of their numbers; or, with scope path, divided anew by "
        "their load at checkpoints",
    )
    zero_stage: Literal[0, 1, 2] = Field(0, description="ZeRO stage: 1 shards optimizer state, 2 gradients as well")


class EvaluationConfig(Section, changes="nothing"):
    """Measurements on held-out trajectories."""

    batch_size: Positive = 8
    rollout_steps: Positive = 10
    stride: Positive | None = Field(
        None, description="time stride of validation and evaluation, one of model.strides; null: the first of them"
    )
