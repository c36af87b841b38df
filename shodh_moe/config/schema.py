"""The configuration of a run: one pydantic model per section, the same for a laptop and a cluster.

A YAML file states only what differs from the defaults here; ``load_config`` adds ``key.sub=value``
overrides from the command line. A key that does not exist or a value of the wrong type is a
`UserError` that names the key, where it was written, and the nearest valid key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    create_model,
    model_serializer,
    model_validator,
)

from shodh_moe.base.section import Fraction, Name, NonNegative, Positive, PositiveFloat, Section
from shodh_moe.config.routers import check_kind
from shodh_moe.solvers.domains import DEFAULT, DOMAINS, Domain

# The tokenizer halves each axis three times (DESIGN 3.2).
COMPRESSION = 8
# What the gating kernels hold in registers (kernels/gating.py and cosine_gating.py; not imported, they need torch).
MAX_EXPERTS = 256
MAX_ROUTING_WIDTH = 128


class Domains(Section):
    """The domains a dataset mixes, a key for each that is registered; null leaves it out, {} takes its defaults."""

    def items(self) -> list[tuple[str, Domain]]:
        named = [(name, getattr(self, name)) for name in type(self).model_fields]
        return [(name, domain) for name, domain in named if domain is not None]

    @model_serializer(mode="wrap")
    def _without_those_never_named(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A domain that is added to the software changes no dataset that does not have it.
        return {name: value for name, value in handler(self).items() if value is not None or name in DEFAULT}


if not TYPE_CHECKING:
    Domains = create_model(
        "Domains",
        __base__=Domains,
        __doc__=Domains.__doc__,
        **{name: (kind | None, kind() if name in DEFAULT else None) for name, kind in DOMAINS.items()},
    )


class DataConfig(Section):
    """Which flow fields to learn from: generated ones, or an existing dataset folder at ``path``."""

    name: Name = "quickstart"
    path: str | None = Field(None, description="an existing dataset folder; null: generate one under `root`")
    root: str = "data"
    seed: NonNegative = 0
    grid: list[Positive] = Field([32, 32, 32])
    snapshots: Positive = Field(24, description="stored snapshots per trajectory")
    compression: Literal["lzf", "gzip"] | None = Field(None, description="of generated files; null: as fast as can be")
    device: Literal["auto", "cpu", "cuda"] = Field("cpu", description="where to simulate; auto: on GPUs if there are")
    domains: Domains = Domains()
    skip_bad: bool = Field(False, description="go on without the files that cannot be read, and list them")
    weights: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        None,
        description="samples of each domain in a micro-batch, relative to 1; 0: none, as if it were not there; "
        "null: equal numbers",
    )

    @model_validator(mode="after")
    def _grid(self) -> DataConfig:
        if len(self.grid) != 3:
            raise ValueError(f"grid needs three sizes [X, Y, Z], not {self.grid}")
        for size in self.grid:
            if size % COMPRESSION:
                raise ValueError(f"grid {self.grid} is not divisible by the tokenizer's compression {COMPRESSION}")
        return self


class TokenizerConfig(Section):
    """The divergence-free autoencoder (DESIGN 3.1, 3.2)."""

    path: str | None = Field(None, description="a trained tokenizer's folder; null: train one under `root`")
    root: str = "tokenizers"
    seed: NonNegative | None = Field(None, description="of its weights, batches and latent copies; null: the run's")
    operator: Literal["spectral", "central2", "central4", "staggered"] = Field(
        "staggered", description="the derivative for which the decoded velocity is free of divergence"
    )
    walls: Literal["none", "ramp", "exact"] = Field(
        "exact",
        description="velocity in solids: small; zero, of a potential that vanishes there; zero, the nearest",
    )
    decoder: Literal["helmholtz", "direct"] = Field(
        "helmholtz", description="direct: a control, the raw velocity as it is, free of no divergence"
    )
    divergence_weight: Annotated[float, Field(ge=0)] = Field(
        0.0, description="of the mean squared divergence in the loss; for the direct decoder"
    )
    latent_channels: Annotated[int, Field(gt=0, le=4 * COMPRESSION**3)] = 128
    widths: list[Positive] = Field([32, 64, 128], description="channels after each of the three stride-2 stages")
    blocks: Positive = Field(1, description="residual blocks per stage")
    steps: Positive = 400
    batch_size: Positive = 8
    learning_rate: PositiveFloat = 1e-3
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the convolutions; bfloat16: autocast, the velocity is conserved in float32"
    )
    activation_checkpointing: bool = Field(False, description="recompute each stage in the backward pass: less memory")
    checkpoint_every: Positive = 100
    log_every: Positive = 20
    latent_copies: Positive = Field(
        4,
        description="latent copies of each training trajectory, at most: itself, and others under random symmetries",
    )
    latent_symmetries: Literal["all", "shifts", "cube"] = Field(
        "all",
        description="of those copies: shifts, the cube's rotations and reflections, or both, as the flow has them",
    )

    @model_validator(mode="after")
    def _fitting(self) -> TokenizerConfig:
        if len(self.widths) != 3:
            raise ValueError(f"widths needs one entry for each of the three stages, not {self.widths}")
        if self.walls != "none" and self.operator == "spectral":
            raise ValueError(
                f"walls {self.walls!r} needs a local operator: a spectral derivative feels the solids everywhere; "
                "set operator to staggered, central2 or central4, or walls to none"
            )
        if self.decoder == "direct" and self.walls != "none":
            raise ValueError("the direct decoder has no walls to keep: set walls to none")
        if self.decoder == "helmholtz" and self.divergence_weight:
            raise ValueError("divergence_weight is for the direct decoder: the helmholtz decoder has no divergence")
        return self


class RouterConfig(Section):
    """Top-1 soft-semantic router (DESIGN 3.5)."""

    kind: Annotated[str, BeforeValidator(check_kind)] = Field(
        "cosine", description="oracle: a control, every token goes to the expert of its domain"
    )
    frozen: bool = Field(False, description="a control: the router stays as it was drawn")
    dim: int = Field(
        16, gt=0, le=MAX_ROUTING_WIDTH, description="width of the projection whose cosine similarity scores the experts"
    )
    temperature: PositiveFloat = Field(0.1, description="initial tau")
    min_temperature: PositiveFloat = 0.01
    balance_weight: Annotated[float, Field(ge=0)] = 0.01
    z_weight: Annotated[float, Field(ge=0)] = 1e-3


class MoEConfig(Section):
    """The sparse feed-forward block (DESIGN 3.4)."""

    num_experts: int = Field(2, ge=0, le=MAX_EXPERTS, description="routed ones; 0: none, the shared ones are dense")
    expert_hidden: Positive = 256
    shared_experts: NonNegative = 1
    dropless: bool = Field(False, description="no capacity: experts take all their tokens, in uneven shares")
    capacity_factor: PositiveFloat = 1.25
    min_capacity: Positive = 4
    drop_order: Literal["position", "probability"] = "position"
    router: RouterConfig = RouterConfig()

    @model_validator(mode="after")
    def _some_expert(self) -> MoEConfig:
        if not self.num_experts and not self.shared_experts:
            raise ValueError("num_experts and shared_experts are both 0: a block needs one expert at least")
        return self


class ModelConfig(Section):
    """The latent transformer (DESIGN 3.4)."""

    dim: Positive = 128
    depth: Positive = 4
    heads: Positive = 4
    patch: Positive = 1
    history: Positive = Field(2, description="snapshots the model sees before it predicts the next")
    moe: MoEConfig = MoEConfig()

    @model_validator(mode="after")
    def _heads(self) -> ModelConfig:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim {self.dim} must divide into {self.heads} heads of even width")
        if self.dim // self.heads < 6:
            raise ValueError(f"head width {self.dim // self.heads} is too small for 3D rotary positions (>= 6)")
        return self


class TrainingConfig(Section):
    """Pretraining: optimizer, schedule and how often to write what."""

    steps: Positive = 400
    batch_size: Positive = Field(16, description="samples per rank and micro-batch")
    accumulation: Positive = Field(1, description="micro-batches whose gradients make one optimizer step")
    learning_rate: PositiveFloat = 1e-3
    min_learning_rate: Annotated[float, Field(ge=0)] = 1e-5
    warmup_steps: NonNegative = 20
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    betas: list[Fraction] = Field([0.9, 0.95])
    grad_clip: PositiveFloat = 1.0
    precision: Literal["float32", "bfloat16", "float64"] = Field(
        "float32", description="of the products; bfloat16: autocast, weights and optimizer stay float32"
    )
    optimizer: Literal["auto", "torch", "deepspeed", "apex"] = Field("auto", description="whose AdamW kernel")
    norm: Literal["auto", "torch", "apex"] = Field("auto", description="whose RMS norm kernel")
    activation_checkpointing: bool = Field(False, description="recompute each block in the backward pass: less memory")
    on_nonfinite: Literal["halt", "skip"] = Field("halt", description="what a loss or gradient that is not finite does")
    stall_seconds: Annotated[float, Field(ge=0)] = Field(
        1800.0, description="end a job in which a rank makes no step for so long, stacks to the run folder; 0: never"
    )
    checkpoint_every: Positive = 100
    keep_last: Positive = 2
    keep_every: NonNegative = Field(0, description="also keep the checkpoints of every so many steps for good; 0: none")
    log_every: Positive = 10
    validate_every: Positive = 100

    @model_validator(mode="after")
    def _betas(self) -> TrainingConfig:
        if len(self.betas) != 2 or max(self.betas) >= 1:
            raise ValueError(f"betas needs two numbers from 0 to below 1, not {self.betas}")
        return self


class TelemetryConfig(Section):
    """What a run tells about its routers and experts, layer by layer."""

    every: Positive = Field(10, description="steps between records of the routers, experts and exchanges")
    starved_below: Fraction = Field(0.1, description="warn of an expert with less than this share of an even load")
    dropped_above: Fraction = Field(0.1, description="warn when more than this share of a domain's tokens is dropped")


class ParallelConfig(Section):
    """World = EP x EDP (DESIGN 7)."""

    processes: Positive | Literal["auto"] = Field("auto", description="ranks on this host; auto: one per GPU, 2 on CPU")
    hostfile: str | None = Field(None, description="hosts and their ranks, in DeepSpeed's form; null: this host")
    ep_size: Positive | Literal["auto"] = Field("auto", description="auto: the most that divides world and experts")
    zero_stage: Literal[0, 1, 2] = Field(0, description="ZeRO: shards optimizer state (1) and gradients too (2)")


class EvaluationConfig(Section):
    """Measurements on held-out trajectories."""

    batch_size: Positive = 8
    rollout_steps: Positive = 10


class RunConfig(Protocol):
    """What the trainer needs of a config, whatever is trained."""

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
    """Everything a run depends on."""

    name: Name = "quickstart"
    seed: NonNegative = Field(0, description="initial weights and data order of tokenizer and pretraining")
    runs: str = Field("runs", description="folder that holds the run folders")
    start: str | None = Field(None, description="a run or checkpoint whose weights to start from; null: random ones")
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    deepspeed: dict[str, Any] = Field({}, description="merged into the DeepSpeed JSON that this config generates")
