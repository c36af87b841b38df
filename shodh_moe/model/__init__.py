"""The latent transformer with mixture-of-experts feed-forward blocks."""

from shodh_moe.model.moe import MoE
from shodh_moe.model.routers import Context
from shodh_moe.model.routing import Routing
from shodh_moe.model.transformer import LatentTransformer, Prediction

__all__ = ["Context", "LatentTransformer", "MoE", "Prediction", "Routing"]
