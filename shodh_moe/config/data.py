"""The ``data`` section."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import SerializerFunctionWrapHandler, create_model, model_serializer, model_validator

from shodh_moe.base.section import Name, NonNegativeFloat, PathText, Positive, Section, Seed, setting
from shodh_moe.config.sizes import misfit
from shodh_moe.config.tokenizer import COMPRESSION
from shodh_moe.solvers.domains import DEFAULT, DOMAINS, Domain


class Domains(Section):
    """The domains of a dataset, one key per registered domain; null leaves a domain out, {} uses its defaults."""

    def items(self) -> list[tuple[str, Domain]]:
        """Return the names and sections of the domains that the dataset has."""
        named = [(name, getattr(self, name)) for name in type(self).model_fields]
        return [(name, domain) for name, domain in named if domain is not None]

    @model_serializer(mode="wrap")
    def _omit_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Registering a new domain must not change the hash of datasets that do not use it.
        return {name: value for name, value in handler(self).items() if value is not None or name in DEFAULT}


if not TYPE_CHECKING:
    Domains = create_model(
        "Domains",
        __base__=Domains,
        __doc__=Domains.__doc__,
        **{name: (kind | None, kind() if name in DEFAULT else None) for name, kind in DOMAINS.items()},
    )


class DataConfig(Section):
    """The flow fields to learn from: a generated dataset, or an existing one at ``path``."""

    # A dataset at `path` is identified by its files, and a generated one by its settings, see `config.paths`.
    name: Name = setting(
        "quickstart", changes="run", description="first part of the names of the dataset, tokenizer and latents folders"
    )
    path: PathText | None = setting(
        None, changes="run", description="folder of an existing dataset; null: generate one under `root`"
    )
    root: PathText = setting("data", changes="run", description="folder that holds the generated datasets")
    seed: Seed = setting(0, changes="data")
    grid: list[Positive] = setting([32, 32, 32], changes="data", description="cells along x, y and z")
    snapshots: Positive = setting(24, changes="data", description="stored snapshots per trajectory")
    compression: Literal["lzf", "gzip"] | None = setting(
        None, changes="nothing", description="compression of generated files; null: none, the fastest"
    )
    device: Literal["auto", "cpu", "cuda"] = setting(
        "cpu", changes="nothing", description="where to simulate; auto: on GPUs if there are any"
    )
    domains: Domains = Domains()
    skip_bad: bool = setting(False, changes="nothing", description="skip files that cannot be read, and list them")
    weights: dict[str, NonNegativeFloat] | None = setting(
        None,
        changes="tokenizer",
        description="relative number of samples of each domain in a micro-batch; a missing domain has weight 1, and "
        "weight 0 leaves the domain out; null: equal numbers",
    )

    @model_validator(mode="after")
    def _check_grid(self) -> DataConfig:
        if len(self.grid) != 3:
            raise ValueError(f"grid needs three sizes [X, Y, Z], not {self.grid}")
        if found := misfit(self.grid, COMPRESSION):
            raise ValueError(f"grid {self.grid} is not divisible by the tokenizer's compression {COMPRESSION}, {found}")
        return self
