"""The tokenizer: encode flow fields to normalised latents, and decode to an exactly divergence-free velocity.

Shapes: B batch, C latent channels, X Y Z space (x y z latent grid, 8x coarser).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import atomic_file, sha256, write_text
from shodh_moe.base.remote_file import local_folder
from shodh_moe.base.tensors import save_tensors
from shodh_moe.config import COMPRESSION, Config, TokenizerConfig
from shodh_moe.config.inputs import Inputs, difference, tokenizer_inputs
from shodh_moe.config.paths import Paths
from shodh_moe.kernels.spectral_curl import compute_dtype
from shodh_moe.tokenizer.autoencoder import Decoder, Encoder, space_to_depth
from shodh_moe.tokenizer.helmholtz import KERNELS, at_centres, conserved_velocity
from shodh_moe.tokenizer.walls import to_faces

FIELDS = ("velocity", "pressure", "solid")  # input fields of a tokenizer


class Flow(NamedTuple):
    """Decoded fields in the units of the data. The velocities may have a wider dtype than the pressure.

    Attributes:
        velocity_B3XYZ: velocity at voxel centres, where the data are.
        pressure_B1XYZ: pressure at voxel centres.
        conserved_B3XYZ: the divergence-free velocity: with the operator ``staggered`` on the lower faces of the voxels,
            with ``velocity`` as its mean; otherwise ``velocity`` itself. A direct decoder has it at the same positions,
            but its divergence does not vanish.
    """

    velocity_B3XYZ: Tensor
    pressure_B1XYZ: Tensor
    conserved_B3XYZ: Tensor


class Tokenizer(nn.Module):
    """Autoencoder with a Helmholtz decoder (DESIGN 3.1), and all its statistics.

    The decoder's layers give a raw velocity; `conserved_velocity` makes it divergence-free, and with
    ``tokenizer.walls`` zero in solids. Thus the linear patches can start from principal components of velocities, and
    no layer has to learn to invert a curl, whose gain grows with the wave number (our choice; see docs/tokenizer.md).

    One velocity scale and one pressure scale (rms over all domains of the training split) normalise the fields;
    latents are normalised per channel. All statistics are buffers and are saved with the weights.

    Args:
        config: the ``tokenizer`` section of a config.
        grid: numbers of voxels along x, y and z.

    Attributes:
        operations: how `decode` makes velocities divergence-free.
    """

    velocity_rms: Tensor
    pressure_rms: Tensor
    latent_mean_C: Tensor
    latent_std_C: Tensor
    geometry_mean_P: Tensor
    geometry_basis_CP: Tensor

    def __init__(self, config: TokenizerConfig, grid: list[int]):
        super().__init__()
        self.config, self.grid, self.operations = config, list(grid), KERNELS
        self.encoder = Encoder(config.widths, config.blocks, config.latent_channels)
        self.decoder = Decoder(config.widths, config.blocks, config.latent_channels)
        patch = COMPRESSION**3
        self.register_buffer("velocity_rms", torch.ones(()))
        self.register_buffer("pressure_rms", torch.ones(()))
        self.register_buffer("latent_mean_C", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std_C", torch.ones(config.latent_channels))
        self.register_buffer("geometry_mean_P", torch.zeros(patch))
        self.register_buffer("geometry_basis_CP", torch.zeros(config.latent_channels, patch))

    @property
    def latent_grid(self) -> list[int]:
        """Numbers of latents along x, y and z."""
        return [size // COMPRESSION for size in self.grid]

    def normalise(self, fields_B5XYZ: Tensor) -> Tensor:
        """Divide velocity and pressure by their training rms; the solid mask stays as it is, [B, 5, X, Y, Z]."""
        velocity, pressure, solid = fields_B5XYZ.split([3, 1, 1], dim=1)
        return torch.cat([velocity / self.velocity_rms, pressure / self.pressure_rms, solid], dim=1)

    def encode(self, fields_B5XYZ: Tensor) -> Tensor:
        """Encode velocity (3), pressure and solid mask in the data's units to normalised latents [B, C, x, y, z]."""
        z = self.encoder(self.normalise(fields_B5XYZ))
        return (z - _column(self.latent_mean_C)) / _column(self.latent_std_C)

    def encode_geometry(self, solid_B1XYZ: Tensor) -> Tensor:
        """The geometry latent [B, C, x, y, z]: leading principal components of each 8^3 patch of the mask.

        Components that the training geometries do not have are zero.
        """
        patches_BPxyz = space_to_depth(solid_B1XYZ, COMPRESSION) - _column(self.geometry_mean_P)
        return torch.einsum("cp,bpxyz->bcxyz", self.geometry_basis_CP, patches_BPxyz)

    def decode_normalised(self, z_raw: Tensor, solid_B1XYZ: Tensor, dtype: torch.dtype | None = None) -> Flow:
        """Decode raw latents to fields divided by their training rms.

        Args:
            z_raw: latents as the encoder returns them, [B, C, x, y, z].
            solid_B1XYZ: 1 in solid voxels, 0 elsewhere.
            dtype: dtype in which the velocity is made divergence-free; None for float32, or float64 if ``z_raw`` is.
        """
        raw, pressure = self.decoder(z_raw, solid_B1XYZ)
        raw, pressure = raw.to(dtype or compute_dtype(raw.dtype)), pressure.to(compute_dtype(pressure.dtype))
        if self.config.decoder == "direct":
            return Flow(raw, pressure, to_faces(raw) if self.config.operator == "staggered" else raw)
        with torch.autocast(raw.device.type, enabled=False):
            conserved = conserved_velocity(raw, solid_B1XYZ, self.config.operator, self.config.walls, self.operations)
            return Flow(at_centres(conserved, self.config.operator), pressure, conserved)

    def decode(self, z: Tensor, solid_B1XYZ: Tensor, dtype: torch.dtype | None = None) -> Flow:
        """Decode normalised latents [B, C, x, y, z] to fields in the data's units; see `decode_normalised`.

        Unless the decoder is direct, div_D of the conserved velocity vanishes to the rounding of ``dtype``.
        """
        z_raw = z * _column(self.latent_std_C) + _column(self.latent_mean_C)
        velocity, pressure, conserved = self.decode_normalised(z_raw, solid_B1XYZ, dtype)
        return Flow(velocity * self.velocity_rms, pressure * self.pressure_rms, conserved * self.velocity_rms)

    def save(self, folder: Path, inputs: Inputs | None = None) -> None:
        """Write ``tokenizer.safetensors``, then ``tokenizer.json`` (config, grid, fields, hash of the weights, inputs).

        Args:
            inputs: what it was trained on, see `tokenizer_inputs`.

        Raises:
            UserError: no space or no permission; both old files are then unchanged.
        """
        with atomic_file(folder / "tokenizer.safetensors") as temporary:
            save_tensors(self.state_dict(), temporary)
        meta = {
            "config": self.config.model_dump(),
            "grid": self.grid,
            "fields": list(FIELDS),
            "sha256": sha256(folder / "tokenizer.safetensors"),
            **({"inputs": inputs} if inputs else {}),
        }
        write_text(folder / "tokenizer.json", json.dumps(meta, indent=2) + "\n")


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Load a tokenizer saved by `Tokenizer.save` from a folder or its URL, on the CPU.

    Raises:
        UserError: it is missing or damaged, or was trained on other fields.
    """
    folder = local_folder(folder)
    weights, meta_path = folder / "tokenizer.safetensors", folder / "tokenizer.json"
    if not weights.exists() or not meta_path.exists():
        raise UserError(f"{folder} holds no finished tokenizer: run `shodh tokenizer train` with this config first")
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
        grid, fields, digest = list(meta["grid"]), list(meta["fields"]), str(meta["sha256"])
        config = TokenizerConfig.model_validate(meta["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{meta_path} is damaged or of another version ({type(error).__name__}): delete {folder} and train again"
        ) from error
    if fields != list(FIELDS):
        raise UserError(
            f"tokenizer {folder} was trained on the fields {', '.join(map(str, fields))}, the data have "
            f"{', '.join(FIELDS)}: set tokenizer.path to one trained on these"
        )
    if sha256(weights) != digest:
        raise UserError(f"{weights} is damaged (its hash differs from tokenizer.json): delete {folder} and train again")
    tokenizer = Tokenizer(config, grid)
    tokenizer.load_state_dict(load_file(weights))
    return tokenizer.eval()


def tokenizer_sha256(folder: Path) -> str | None:
    """Return the SHA-256 of a saved tokenizer's weights; None if there is no tokenizer."""
    try:
        return str(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError):
        return None


def _column(x_C: Tensor) -> Tensor:
    return x_C[:, None, None, None]


def require_fit(tokenizer: Tokenizer, config: Config, paths: Paths) -> None:
    """Check that the tokenizer's grid is that of the data (its fields are checked when it is loaded).

    Raises:
        UserError: the grids differ.
    """
    if tokenizer.grid != config.data.grid:
        raise UserError(
            f"tokenizer {paths.tokenizer} was trained on grid {tokenizer.grid}, data.grid is "
            f"{config.data.grid}: set tokenizer.path to one of that grid, or to null to train one"
        )


def use_tokenizer(config: Config, paths: Paths) -> str:
    """Check that the tokenizer of a config, which exists, can be used, and return a phrase that says which it is.

    Raises:
        UserError: it is damaged, of another grid, or was trained on something else than the config's data.
    """
    folder = paths.tokenizer
    require_fit(load_tokenizer(folder), config, paths)
    if config.tokenizer.path:
        return f"given, {folder}"
    recorded = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("inputs", {})
    if found := difference(recorded, tokenizer_inputs(config, paths)):
        raise UserError(
            f"tokenizer {folder} was trained on something else, which differs in {found}: restore that, set "
            f"tokenizer.path to this folder to keep the tokenizer, or remove {folder} to train it again"
        )
    return f"unchanged, {folder}"
