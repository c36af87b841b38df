"""The latent transformer with mixture-of-experts feed-forward blocks."""

from shodh_moe.model.moe import MoE, Routing
from shodh_moe.model.transformer import LatentTransformer, Prediction

__all__ = ["LatentTransformer", "MoE", "Prediction", "Routing"]
