"""The config of a mixture: domain experts that become the paths of one model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from shodh_moe.base.errors import UserError
from shodh_moe.base.section import PathText, with_old_values
from shodh_moe.config import Config, ModelConfig
from shodh_moe.config.load import read_yaml
from shodh_moe.merging.config import Strict, explain
from shodh_moe.merging.inputs import InputModel
from shodh_moe.merging.settings import DISTANCE_LIMIT


class DomainExpert(Strict):
    """One entry of ``models``.

    Attributes:
        model: a checkpoint or exported model of a dense network, or of one with a single expert and scope path.
        domain: the domain whose flows take this expert's path.
    """

    model: PathText = Field(min_length=1)
    domain: str = Field(min_length=1)


class MixtureConfig(Strict):
    """The config as written.

    Attributes:
        base_model: the checkpoint that all experts were trained from.
        router: keys of ``model.moe.router`` in the merged model.
        latents: folder of cached latents with all domains, for a cosine router; None: each expert's own.
        attention: for dense experts: whether each path has attention projections of its own (``model.moe.attention``).
        distance_limit: see the parameter of `shodh merge`.
    """

    models: list[DomainExpert] = Field(min_length=2)
    base_model: PathText
    router: dict[str, Any] = Field(default_factory=dict)
    latents: PathText | None = None
    attention: Literal["own", "shared"] = "own"
    distance_limit: float = DISTANCE_LIMIT
    output: PathText | None = None


@dataclass(frozen=True)
class Mixture:
    """A mixture to make.

    Attributes:
        config: as written.
        output: the new folder.
        experts: sorted by domain, so that expert e has the e-th domain, as the router ``oracle`` needs.
    """

    config: MixtureConfig
    output: Path
    experts: list[DomainExpert]

    @property
    def paths(self) -> list[str]:
        """All inputs, the base first."""
        return [self.config.base_model, *(expert.model for expert in self.experts)]


def load_mixture(path: Path, output: Path | None = None) -> Mixture:
    """Read a config; ``output`` overrides the config's key of that name.

    Raises:
        UserError: it is unreadable, has unknown or invalid keys or no output, or names a model or domain twice.
    """
    tree = read_yaml(path, "check its path")
    try:
        config = MixtureConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, MixtureConfig, DomainExpert)}") from None
    if not (output or config.output):
        raise UserError(f"{path} has no output folder: write `output: FOLDER`, or give --output")
    experts = sorted(config.models, key=lambda expert: expert.domain)
    for key in ("domain", "model"):
        names = [getattr(expert, key) for expert in experts]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"{path}: models names the {key} {twice} twice: a mixture has one expert for each domain")
    return Mixture(config, output or Path(str(config.output)), experts)


def mixture_model(mixture: Mixture, expert: InputModel) -> ModelConfig:
    """The section ``model`` of the merged model, from that of one of its experts, which all share.

    Raises:
        UserError: the expert is neither dense nor has a single expert on a path, is no checkpoint, or ``router`` has
            an unknown or invalid key.
    """
    if not expert.state:
        raise UserError(
            f"{expert.path} is neither a checkpoint nor an exported model: its config must say how the model is built"
        )
    model = config_of(expert).model
    moe, count = model.moe, len(mixture.experts)
    dense = moe.num_experts == 0
    if model.film or not (dense or (moe.num_experts == 1 and moe.scope == "path")):
        what = "film" if model.film else f"{moe.num_experts} experts and scope {moe.scope}"
        raise UserError(
            f"{expert.path} has {what}: a mixture is made of dense models (model.moe.num_experts 0) or of models with "
            "num_experts 1 and scope path"
        )
    tree = model.model_dump()
    tree["moe"]["num_experts"] = count
    if dense:
        own = {"scope": "path", "attention": mixture.config.attention, "shared_experts": 0, "shared_linear": False}
        tree["moe"] |= {**own, "expert_hidden": moe.shared_experts * moe.expert_hidden}
    tree["moe"]["router"] |= mixture.config.router
    try:
        made = ModelConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"the merged model's {where}: {first['msg']}, not {str(first['input'])[:60]!r}") from None
    if made.moe.router.kind not in ("cosine", "oracle"):
        raise UserError(
            f"a merged router is cosine or oracle, not {made.moe.router.kind}: write `router: {{kind: cosine}}`"
        )
    return made


def config_of(model: InputModel) -> Config:
    """The config that a checkpoint was trained with. Raises: UserError: it has none that this version understands."""
    try:
        return Config.model_validate(with_old_values(Config, model.state["config"]))
    except (KeyError, ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"checkpoint {model.path} has no config that this version understands: {reason}") from None
