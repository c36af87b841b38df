"""The ``tokenizer`` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from shodh_moe.base.section import (
    NonNegative,
    NonNegativeFloat,
    PathText,
    Positive,
    PositiveFloat,
    Section,
    Seed,
    setting,
)

# The tokenizer halves each axis three times (DESIGN 3.2).
COMPRESSION = 8


class TokenizerConfig(Section):
    """The divergence-free autoencoder (DESIGN 3.1, 3.2)."""

    # A tokenizer at `path` is identified by its contents, see `config.paths`.
    path: PathText | None = setting(
        None, changes="run", description="folder of a trained tokenizer; null: train one under `root`"
    )
    root: PathText = setting("tokenizers", changes="run", description="folder that holds the trained tokenizers")
    seed: Seed | None = setting(
        None, changes="tokenizer", description="seed of its weights, batches and latent copies; null: the run's seed"
    )
    operator: Literal["spectral", "central2", "central4", "staggered"] = setting(
        "staggered", changes="tokenizer", description="derivative under which the decoded velocity is divergence-free"
    )
    walls: Literal["none", "ramp", "exact"] = setting(
        "exact",
        changes="tokenizer",
        description="velocity in solids. none: small; ramp: zero, as the vector potential fades out there; exact: "
        "zero, by projection to the closest such divergence-free velocity",
    )
    decoder: Literal["helmholtz", "direct"] = setting(
        "helmholtz",
        changes="tokenizer",
        description="direct: a control that outputs the raw velocity, which is not divergence-free",
    )
    divergence_weight: NonNegativeFloat = setting(
        0.0,
        changes="tokenizer",
        description="weight of the mean squared divergence in the loss; for the direct decoder only",
    )
    latent_channels: Annotated[int, Field(gt=0, le=4 * COMPRESSION**3)] = setting(128, changes="tokenizer")
    widths: list[Positive] = setting(
        [32, 64, 128], changes="tokenizer", description="channels after each of the three stride-2 stages"
    )
    blocks: Positive = setting(1, changes="tokenizer", description="residual blocks per stage")
    patches: Literal["apart", "overlapping"] = setting(
        "apart",
        changes="tokenizer",
        description="blocks of 8^3 cells that the linear maps take. overlapping: windows of 16^3 cells",
    )
    refine: NonNegative = setting(
        0,
        changes="tokenizer",
        description="channels of two more convolutions after the decoder's patches, at full resolution; 0: none",
    )
    scales: Literal["all", "sample"] = setting(
        "all",
        changes="tokenizer",
        description="what velocity and pressure are divided by. all: their rms over the training split; sample: their "
        "rms in each snapshot, whose logarithms are the last two latent channels",
    )
    steps: Positive = setting(400, changes="tokenizer", description="optimizer steps")
    batch_size: Positive = setting(8, changes="tokenizer", description="snapshots per optimizer step, over all ranks")
    learning_rate: PositiveFloat = setting(1e-3, changes="tokenizer")
    precision: Literal["float32", "bfloat16"] = setting(
        "float32",
        changes="tokenizer",
        description="precision of the convolutions; bfloat16: autocast, but the divergence is removed in float32",
    )
    # These three change no weight of the tokenizer, but a run folder does not accept other values of them.
    activation_checkpointing: bool = setting(
        False, changes="run", description="recompute each stage in the backward pass to save memory"
    )
    checkpoint_every: Positive = setting(100, changes="run", description="steps between checkpoints")
    log_every: Positive = setting(20, changes="run", description="steps between records in metrics.jsonl")
    latent_copies: Positive = setting(
        4,
        changes="latents",
        description="maximum number of latent copies of each training trajectory: the original and copies under random "
        "symmetries",
    )
    latent_symmetries: Literal["all", "shifts", "cube"] = setting(
        "all",
        changes="latents",
        description="symmetries of the copies: shifts, rotations and reflections of the cube, or all; only those that "
        "the flow has",
    )

    @model_validator(mode="after")
    def _check_combination(self) -> TokenizerConfig:
        if len(self.widths) != 3:
            raise ValueError(f"widths needs one entry for each of the three stages, not {self.widths}")
        if self.scales == "sample" and self.latent_channels < 3:
            raise ValueError(
                f"scales 'sample' takes two of the latent channels, of which there are {self.latent_channels}: set "
                "latent_channels to at least 3, or scales to all"
            )
        if self.walls != "none" and self.operator == "spectral":
            raise ValueError(
                f"walls {self.walls!r} needs a local operator, but a spectral derivative senses solids everywhere: "
                "set operator to staggered, central2 or central4, or walls to none"
            )
        if self.decoder == "direct" and self.walls != "none":
            raise ValueError("the direct decoder does not enforce walls: set walls to none")
        if self.decoder == "helmholtz" and self.divergence_weight:
            raise ValueError("divergence_weight is for the direct decoder: the helmholtz decoder has no divergence")
        return self
