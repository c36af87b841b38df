"""Expert-parallel training of multi-physics foundation models on divergence-free latents."""

from shodh_moe.base.home import ensure_home

__version__ = "0.1.0"

ensure_home()  # before any library that looks for a home folder is imported
