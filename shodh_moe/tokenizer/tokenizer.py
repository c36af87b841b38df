"""The tokenizer: flow fields to normalised latents, and back to an exactly divergence-free velocity.

Shapes: B batch, C latent channels, X Y Z space (x y z latent grid, 8x coarser).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shodh_moe.config import COMPRESSION, TokenizerConfig
from shodh_moe.errors import UserError
from shodh_moe.files import sha256
from shodh_moe.kernels import curl
from shodh_moe.tokenizer.autoencoder import Decoder, Encoder


class Flow(NamedTuple):
    """Decoded fields in the units of the data. ``velocity`` may have a wider dtype than ``pressure``."""

    velocity_B3XYZ: Tensor
    pressure_B1XYZ: Tensor


class Tokenizer(nn.Module):
    """Autoencoder with a Helmholtz decoder, u = curl_D(A) + Ubar (DESIGN 3.1), and all its statistics.

    One velocity scale and one pressure scale (rms over every domain of the training split) normalise the
    fields; latents are normalised per channel. Both sets of statistics are buffers and travel with the weights.
    """

    velocity_rms: Tensor
    pressure_rms: Tensor
    latent_mean_C: Tensor
    latent_std_C: Tensor
    geometry_mean_C: Tensor
    geometry_std_C: Tensor

    def __init__(self, config: TokenizerConfig, grid: list[int]):
        super().__init__()
        self.config, self.grid = config, list(grid)
        self.encoder = Encoder(config.widths, config.blocks, config.latent_channels)
        self.decoder = Decoder(config.widths, config.blocks, config.latent_channels)
        for name in ("velocity_rms", "pressure_rms"):
            self.register_buffer(name, torch.ones(()))
        for name in ("latent", "geometry"):
            self.register_buffer(f"{name}_mean_C", torch.zeros(config.latent_channels))
            self.register_buffer(f"{name}_std_C", torch.ones(config.latent_channels))

    @property
    def latent_grid(self) -> list[int]:
        return [size // COMPRESSION for size in self.grid]

    def normalise(self, fields_B5XYZ: Tensor) -> Tensor:
        """Velocity and pressure over their training rms; the solid mask unchanged."""
        scale = torch.cat([self.velocity_rms.expand(3), self.pressure_rms.expand(1), torch.ones_like(self.velocity_rms)[None]])
        return fields_B5XYZ / scale[:, None, None, None]

    def encode(self, fields_B5XYZ: Tensor) -> Tensor:
        """Velocity (3), pressure, solid mask in the data's units -> normalised latents [B, C, x, y, z]."""
        return _standardise(self.encoder(self.normalise(fields_B5XYZ)), self.latent_mean_C, self.latent_std_C)

    def encode_geometry(self, solid_B1XYZ: Tensor) -> Tensor:
        """The latent of this geometry with the fluid at rest, normalised with statistics of its own."""
        at_rest = torch.cat([solid_B1XYZ.new_zeros(len(solid_B1XYZ), 4, *solid_B1XYZ.shape[2:]), solid_B1XYZ], dim=1)
        return _standardise(self.encoder(at_rest), self.geometry_mean_C, self.geometry_std_C)

    def decode_normalised(self, z_raw: Tensor, solid_B1XYZ: Tensor, dtype: torch.dtype | None = None) -> Flow:
        """Raw latents -> fields over their training rms; the curl is computed in ``dtype``."""
        potential, mean, pressure = self.decoder(z_raw, solid_B1XYZ)
        dtype = dtype or potential.dtype
        velocity = curl(potential.to(dtype), mean.to(dtype), self.config.operator)
        return Flow(velocity, pressure)

    def decode(self, z: Tensor, solid_B1XYZ: Tensor, dtype: torch.dtype | None = None) -> Flow:
        """Normalised latents -> fields in the data's units; div_D(velocity) vanishes to the rounding of ``dtype``."""
        z_raw = z * self.latent_std_C[:, None, None, None] + self.latent_mean_C[:, None, None, None]
        flow = self.decode_normalised(z_raw, solid_B1XYZ, dtype)
        return Flow(flow.velocity_B3XYZ * self.velocity_rms, flow.pressure_B1XYZ * self.pressure_rms)

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.safetensors`` and ``tokenizer.json`` (config, grid, hash of the weights)."""
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "tokenizer.safetensors")
        meta = {
            "config": self.config.model_dump(),
            "grid": self.grid,
            "fields": ["velocity", "pressure", "solid"],
            "sha256": sha256(folder / "tokenizer.safetensors"),
        }
        (folder / "tokenizer.json").write_text(json.dumps(meta, indent=2) + "\n")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read a tokenizer that `Tokenizer.save` wrote. Raises `UserError` if it is missing or damaged."""
    weights, meta_path = folder / "tokenizer.safetensors", folder / "tokenizer.json"
    if not weights.exists() or not meta_path.exists():
        raise UserError(f"{folder} holds no finished tokenizer: run `shodh tokenizer train` with this config first")
    meta = json.loads(meta_path.read_text())
    if sha256(weights) != meta["sha256"]:
        raise UserError(f"{weights} is damaged (its hash differs from tokenizer.json): delete {folder} and train again")
    tokenizer = Tokenizer(TokenizerConfig.model_validate(meta["config"]), meta["grid"])
    tokenizer.load_state_dict(load_file(weights))
    return tokenizer.eval()


def _standardise(z: Tensor, mean_C: Tensor, std_C: Tensor) -> Tensor:
    return (z - mean_C[:, None, None, None]) / std_C[:, None, None, None]
