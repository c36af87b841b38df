"""Expert-parallel training of multi-physics foundation models on divergence-free latents."""

__version__ = "0.1.0"
