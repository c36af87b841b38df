"""Chains of predictions, each made from those before it.

Shapes: B batch, H history, C latent channels, x y z latent grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from shodh_moe.model.routers import Context
from shodh_moe.model.transformer import LatentTransformer, Prediction


def predictions(
    transformer: LatentTransformer,
    history_BHCxyz: Tensor,
    geometry_BCxyz: Tensor,
    context: Context | None = None,
    call: Callable[..., Prediction] | None = None,
    through: bool = False,
) -> Iterator[Prediction]:
    """Yield one prediction after the other, without end.

    The paths of the samples are chosen once, from the given latents, since a flow stays in its domain; the errors of
    predicted latents could lead the router astray.

    Args:
        context: as in `LatentTransformer.forward`.
        call: runs the transformer's forward pass, such as a training engine; None: the transformer itself.
        through: whether gradients flow from a prediction to those that it was made from.
    """
    plan = transformer.lasting_plan(history_BHCxyz, geometry_BCxyz, context)
    while True:
        prediction = (call or transformer)(history_BHCxyz, geometry_BCxyz, context, plan)
        yield prediction
        latest_BCxyz = prediction.latent_BCxyz if through else prediction.latent_BCxyz.detach()
        history_BHCxyz = torch.cat([history_BHCxyz[:, 1:], latest_BCxyz[:, None]], dim=1)
