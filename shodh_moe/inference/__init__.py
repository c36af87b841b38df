"""Use a trained model: load it, continue a flow, decode latents, export it."""

from shodh_moe.inference.forecasting import forecast, load_model
from shodh_moe.inference.loading import Models

__all__ = ["Models", "forecast", "load_model"]
