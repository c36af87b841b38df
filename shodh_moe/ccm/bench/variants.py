"""Variants of a family's benchmark: one change each of the experts, of the path between them, or of the readout."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from shodh_moe.base.section import Positive, PositiveFloat, Section
from shodh_moe.ccm.config import ExpertConfig
from shodh_moe.ccm.family_config import FamilyConfig, Split

Layer = Literal["lift", "spectral", "pointwise", "projection"]
Curved = Literal["anchor", "middle", "jacobian", "anchor_jacobian", "outputs"]
THROUGH_ANCHOR = ("anchor", "anchor_jacobian")
TWIN_SEED = 1000  # added to the seed of the expert that is trained a second time


class Variant(Section):
    """What differs from the family's own CCM. Keys that are left out are unchanged."""

    steps: Positive | None = Field(None, description="steps of the endpoint experts")
    learning_rate: PositiveFloat | None = Field(None, description="rate of the endpoint experts; its end scales along")
    ends: PositiveFloat | None = Field(None, description="the endpoint experts are trained at s = -ends and ends")
    support: list[float] | None = Field(None, description="s of the regimes that the anchor is trained on")
    anchor: FamilyConfig | None = Field(None, description="another family that the anchor is trained on")

    layers: list[Layer] | None = Field(None, description="layers that follow alpha; the others are the average")
    direction: Literal["random", "none", "twins"] | None = Field(
        None,
        description="direction from the average: random, of the same length in every tensor; none, the average alone; "
        "twins, that between two seeds of the expert at the low end, scaled to the same length",
    )
    curve: Curved | None = Field(
        None,
        description="instead of the line a parabola through the anchor, through a third expert at s = 0 (middle), or "
        "through a point computed from the Jacobian at the experts' average (jacobian) or at the anchor "
        "(anchor_jacobian); or outputs: both experts predict, and their predictions are extrapolated",
    )
    bow: Literal["full", "validation"] = Field(
        "full",
        description="curve: through the third point, or a share of its distance from the line, chosen on validation",
    )

    frames: Positive | None = Field(None, description="frames of the prefix readout; errors count the same later ones")
    noise: PositiveFloat | None = Field(
        None, description="noise on the frames that the prefix readout sees, in standard deviations of each channel"
    )
    groups: bool = Field(False, description="the prefix readout finds one alpha for each of input, blocks and output")
    oracle: bool = Field(False, description="measure the best alpha on the test regimes too, a bound")

    @model_validator(mode="after")
    def _fits_together(self) -> Variant:
        line = [key for key in ("layers", "direction", "curve") if getattr(self, key) is not None]
        if len(line) > 1:
            raise ValueError(f"{' and '.join(line)} exclude each other: they all replace the line between the experts")
        if self.groups and line:
            raise ValueError(f"groups needs the line between the experts: leave out {line[0]}")
        if self.curve and self.ends:
            raise ValueError("curve passes through the experts at s = -1 and 1: leave out ends")
        if self.curve in THROUGH_ANCHOR and (self.support is not None or self.anchor):
            raise ValueError(f"curve: {self.curve} uses the family's own anchor: leave out support and anchor")
        if self.bow != "full" and self.curve in (None, "outputs"):
            raise ValueError("bow is for a parabola: add curve, other than outputs, or leave bow out")
        for key in ("layers", "support"):
            values = getattr(self, key)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ValueError(f"{key} {values} must be one or more different values")
        return self

    @property
    def is_path(self) -> bool:
        """Whether it only has another path between the family's own experts, or alphas by group."""
        return not self.model_dump(exclude_defaults=True, exclude={"curve", "bow", "groups", "oracle"})

    @property
    def generates(self) -> bool:
        """Whether it needs regimes that only a built-in family can generate."""
        return self.ends is not None or self.support is not None or self.curve == "middle"


def own_experts(variant: Variant, base: dict[str, ExpertConfig]) -> dict[str, ExpertConfig]:
    """The experts that a variant has instead of, or besides, the family's own.

    Variants that need the same expert share its run.

    Args:
        base: the family's own experts ``anchor``, ``low`` and ``high``.

    Returns:
        any of ``anchor``, ``low``, ``high``, ``twin`` (the low expert with another seed) and ``middle``.
    """
    found: dict[str, ExpertConfig] = {}
    anchor, anchor_tag = base["anchor"], ""
    if variant.support is not None:
        anchor_tag += "-support" + "".join(f"{s:+g}" for s in variant.support)
        anchor = _with(anchor, family=_only(anchor.family, support=variant.support))
    if variant.anchor:
        anchor_tag += f"-on-{variant.anchor.name}-{variant.anchor.folder().name.removeprefix('ccm-')}"
        family = variant.anchor if variant.anchor.source else _only(variant.anchor, support=variant.support)
        anchor = _with(anchor, family=family)
    if anchor_tag:
        anchor = found["anchor"] = _with(anchor, name=anchor.name + anchor_tag)
    tag = anchor_tag
    tag += f"-steps{variant.steps}" if variant.steps else ""
    tag += f"-rate{variant.learning_rate:g}" if variant.learning_rate else ""
    tag += f"-ends{variant.ends:g}" if variant.ends else ""
    ends = {role: _fine_tuned(variant, base[role], anchor, tag) for role in ("low", "high")}
    if tag:
        found |= ends
    if variant.direction == "twins":
        low = ends["low"]
        found["twin"] = _with(low, name=f"{low.name}-twin", seed=low.seed + TWIN_SEED)
    if variant.curve == "middle":
        name = "-middle".join(ends["low"].name.rsplit("-low", 1))
        middle = _with(ends["low"], name=name, splits=["support"])
        counts = {**middle.family.trajectories, "support": middle.family.family().trajectories["endpoint_low"]}
        family = _only(middle.family, support=[0.0])
        found["middle"] = _with(middle, family=family.model_copy(update={"trajectories": counts}))
    return found


def _fine_tuned(variant: Variant, expert: ExpertConfig, anchor: ExpertConfig, tag: str) -> ExpertConfig:
    training = expert.training
    if variant.steps:
        training = training.model_copy(update={"steps": variant.steps})
    if variant.learning_rate:
        last = training.min_learning_rate * variant.learning_rate / training.learning_rate
        training = training.model_copy(update={"learning_rate": variant.learning_rate, "min_learning_rate": last})
    family = expert.family
    if variant.ends:
        family = _only(family, endpoint_low=[-variant.ends], endpoint_high=[variant.ends])
    start = f"{anchor.runs}/{anchor.name}"
    return _with(expert, name=expert.name + tag, training=training, family=family, start=start)


def _only(family: FamilyConfig, **regimes: list[float] | None) -> FamilyConfig:
    """The family with the given regimes and the validation's alone, so that no others are generated.

    A split that is given as None keeps its regimes.
    """
    places: dict[Split, list[float]] = {**family.coordinates}
    for split in get_args(Split):
        if split not in regimes and split != "validation":
            places[split] = []
        elif given := regimes.get(split):
            places[split] = given
    return FamilyConfig.model_validate({**family.model_dump(), "coordinates": places})


def _with(expert: ExpertConfig, **changes: object) -> ExpertConfig:
    """The config with other values, checked anew."""
    dumped = {key: getattr(value, "model_dump", lambda value=value: value)() for key, value in changes.items()}
    return ExpertConfig.model_validate({**expert.model_dump(), **dumped})
