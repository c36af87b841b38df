"""The tokenizer: an autoencoder between flow fields and latents; its decoded velocity is exactly divergence-free."""

from shodh_moe.tokenizer.tokenizer import Flow, Tokenizer, load_tokenizer

__all__ = ["Flow", "Tokenizer", "load_tokenizer"]
