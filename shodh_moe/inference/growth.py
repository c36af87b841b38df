"""Grow a mixture by one path for a new domain; the decisions for all other samples stay (docs/finetune.md).

Shapes: M contexts, F features of the path router, D known domains.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.base.parameters import marks
from shodh_moe.config import ModelConfig
from shodh_moe.inference.contexts import Contexts
from shodh_moe.inference.discriminant import fit
from shodh_moe.model import Context, LatentTransformer
from shodh_moe.model.routers import Slots

LEAST_TAKEN = 0.5  # share of the new validation samples that have to take the new path
ROUTER = "path.router."
MARGINS = f"{ROUTER}margins_KF"
# Where the boundary is between the known context (0) and the new one (1) that come closest to each other. Unseen
# samples of the known domains, of which there are many contexts, come little closer than 0; those of a new domain with
# few trajectories come much closer than 1 (docs/finetune.md).
BOUNDARY = 0.2
ROUNDING = 1e-3  # smallest distance of the boundary from the nearest known context, relative to the range of margins


@dataclass(frozen=True)
class Grown:
    """A grown model.

    Attributes:
        model: its section ``model``.
        weights: by name.
        copied: the path that the new one starts as a copy of.
        taken: share of the new validation samples that take the new path.
        nearest: the known domain whose contexts come nearest to the new ones.
    """

    model: ModelConfig
    weights: dict[str, Tensor]
    copied: int
    taken: float
    nearest: str


def require_growable(model: ModelConfig, name: str) -> None:
    """Raise `UserError` if a model cannot get a further path."""
    moe, remedy = model.moe, "use --train all or lora"
    if not moe.num_experts:
        raise UserError(f"{name} is dense, so it has no paths: make one with `shodh merge upcycle`, or {remedy}")
    fits = moe.scope == "path" and moe.router.kind != "oracle" and moe.router.context == "sample" and moe.top_k == 1
    if not fits:
        raise UserError(
            f"{name} has scope {moe.scope}, top_k {moe.top_k} and a router of kind {moe.router.kind}, context "
            f"{moe.router.context}: --train expert needs scope path, top_k 1, kind cosine or linear, and context "
            f"sample; {remedy}"
        )


@torch.no_grad()
def grow(transformer: LatentTransformer, model: ModelConfig, known: Contexts, new: Contexts) -> Grown:
    """Add a path that takes the samples of a new domain and starts as a copy of the one that most of them take now.

    The boundary between the new domain and each known one has the direction of a linear discriminant. It lies between
    the known and the new contexts, nearer to the known ones (`BOUNDARY`). If they overlap, it is moved until no known
    context takes the new path.

    Args:
        transformer: on the CPU.
        model: its section ``model``, which has passed `require_growable`, with the settings of the further training.
        known: contexts of the domains that keep their paths.
        new: contexts of one new domain.

    Raises:
        UserError: fewer than half of the new validation samples would take the new path.
    """
    margins_DF, known_M, new_M = _margins(known, new)
    # Computed as the router does, in float32.
    taken = float((new_M[new.valid_M] > 0).double().mean()) if new.valid_M.any() else float((new_M > 0).double().mean())
    nearest = known.domains[int(known.domain_M[known_M.argmax()])]
    if taken < LEAST_TAKEN:
        raise UserError(
            f"only {taken:.0%} of the new validation samples would take a new path, because they look like those of "
            f"{nearest}, which keep theirs: use --train all or lora"
        )
    copied = _usual_path(transformer, new)
    added = model.moe.router.added
    tree = model.model_dump()
    tree["moe"]["num_experts"] += 1
    tree["moe"]["router"]["added"] = [*added, len(margins_DF)]
    weights = {}
    for name, parameter in transformer.state_dict(keep_vars=True).items():
        tensor = parameter.detach()
        if marks(parameter).per_expert:
            tensor = torch.cat([tensor, tensor[copied : copied + 1]])
        if name.startswith(ROUTER) and not added:
            name = f"{ROUTER}base.{name.removeprefix(ROUTER)}"
        weights[name] = tensor.clone()
    before = weights.get(MARGINS)
    weights[MARGINS] = margins_DF if before is None else torch.cat([before, margins_DF])
    return Grown(ModelConfig.model_validate(tree), weights, copied, taken, nearest)


def _margins(known: Contexts, new: Contexts) -> tuple[Tensor, Tensor, Tensor]:
    """The new expert's margins, float32 [D, F], and the smallest margin of each known and each new context."""
    known_MF, new_MF = known.of_router(), new.of_router()
    domains = len(known.domains)
    rows_MF = torch.cat([known_MF, new_MF])[:, :-1]
    domain_M = torch.cat([known.domain_M, torch.full((len(new_MF),), domains)])
    scores_DF = fit(rows_MF, domain_M, domains + 1).scores()
    margins_DF = scores_DF[-1] - scores_DF[:-1]
    margins_DF = margins_DF / margins_DF[:, :-1].norm(dim=1, keepdim=True).mean()

    def smallest(rows_MF: Tensor) -> Tensor:
        return (rows_MF.to(margins_DF.dtype) @ margins_DF.T).amin(1)

    inner, outer = smallest(known_MF).max(), smallest(new_MF).min()
    room = ROUNDING * (smallest(new_MF).max() - smallest(known_MF).min())
    margins_DF[:, -1] -= torch.maximum(inner + BOUNDARY * (outer - inner), inner + room)
    margins_DF = margins_DF.float()
    return margins_DF, smallest(known_MF), smallest(new_MF)


def _usual_path(transformer: LatentTransformer, new: Contexts) -> int:
    """The path that most of the new samples take before the growth."""
    assert transformer.path is not None
    x_MF = new.of_router()
    slots = Slots(len(x_MF), row_N=torch.arange(len(x_MF)))
    expert_M = transformer.path.router(x_MF, Context(len(x_MF)), slots).expert_N
    return int(expert_M.bincount().argmax())
