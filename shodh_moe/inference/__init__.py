"""Use a trained model: load it, continue a flow, decode latents, export it."""

from shodh_moe.inference.loading import load_model
from shodh_moe.inference.model import Model

__all__ = ["Model", "load_model"]
