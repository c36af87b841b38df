"""Encode a dataset to the latent cache, whose format `latents` describes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import h5py
import torch
from torch import Tensor
from torch.nn import functional as F

from shodh_moe.base.boundaries import codes_of
from shodh_moe.base.errors import UserError
from shodh_moe.base.files import sha256
from shodh_moe.base.progress import progress
from shodh_moe.base.threads import map_in_threads
from shodh_moe.config import COMPRESSION, Config
from shodh_moe.config.inputs import Inputs, data_inputs
from shodh_moe.config.paths import LATENTS_VERSION, Paths, tokenizer_seed
from shodh_moe.data import SPLITS, Trajectory, TrajectoryRecord, list_trajectories
from shodh_moe.data.hdf5 import new_hdf5
from shodh_moe.data.loader import Snapshots, read_batches, reading_threads
from shodh_moe.data.symmetry import Symmetry, draw_copies
from shodh_moe.tokenizer.latents import mean_squared_change
from shodh_moe.tokenizer.tokenizer import Tokenizer, tokenizer_sha256

BATCH = 8  # number of snapshots to encode at a time
WORKSPACE = 8  # memory of one call of the encoder, in units of its input (6.4 measured at 32^3)


@torch.no_grad()
def encode_dataset(
    tokenizer: Tokenizer,
    dataset: Path,
    grid: Sequence[int],
    folder: Path,
    copies: int,
    seed: int,
    device: str = "cpu",
    skip_bad: bool = False,
    symmetries: str = "all",
    tokenizer_folder: Path | None = None,
    inputs: Inputs | None = None,
) -> None:
    """Encode every trajectory of every split into ``folder``, which should be temporary until this returns.

    Each training trajectory is encoded up to ``copies`` times: unchanged, and under different symmetries of its flow.
    Shifts by a fraction of a latent cell give latents that the first copy does not have. Only a few batches of
    snapshots are in memory at a time.

    Args:
        dataset: folder of the dataset.
        grid: its numbers of voxels along x, y and z, which need not be those of the tokenizer's training data.
        copies: number of copies of each training trajectory, including the unchanged one.
        seed: selects the symmetries.
        skip_bad: whether to skip unusable files (``data.skip_bad``).
        symmetries: ``all``, ``shifts`` or ``cube``, see `draw_copies`. A flow with fewer symmetries gets fewer copies.
        tokenizer_folder: the folder from which ``tokenizer`` was read. Without it the cache does not record its
            tokenizer, and `load_latents` refuses it whenever a tokenizer is given there.
        inputs: further values for the cache to record, see `latent_inputs`.

    Raises:
        UserError: bad data, or latents that are not finite (names the trajectory).
    """
    tokenizer = tokenizer.to(device).eval()
    listed = {split: list_trajectories(dataset, split, grid, skip_bad) for split in SPLITS}
    snapshots = Snapshots([record for records in listed.values() for record in records])
    batches, jobs, first = [], [], 0
    for split, records in listed.items():
        for number, record in enumerate(records):
            drawn = draw_copies([seed, number], record, copies if split == "train" else 1, symmetries)
            for copy, symmetry in enumerate(drawn):
                for start in range(0, record.n_snapshots, BATCH):
                    batches.append(range(first + start, first + min(start + BATCH, record.n_snapshots)))
                    jobs.append((split, record, copy, symmetry, start))
            first += record.n_snapshots
    reads = read_batches(snapshots, batches, reading_threads(), pin=torch.device(device).type == "cuda")

    def encode(job: tuple[Symmetry, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the latents of a batch and the solid mask of its first snapshot."""
        symmetry, fields_B5XYZ = job
        fields_B5XYZ = symmetry.apply(fields_B5XYZ.to(device, non_blocking=True))
        return tokenizer.encode(fields_B5XYZ).cpu(), fields_B5XYZ[:1, 4:]

    flows = zip((symmetry for _, _, _, symmetry, _ in jobs), reads, strict=True)
    batch_bytes = BATCH * 5 * math.prod(grid) * 4
    encoded = map_in_threads(encode, flows, WORKSPACE * batch_bytes) if device == "cpu" else map(encode, flows)
    stats = dataset / "stats.yaml"
    origin = {
        "tokenizer_sha256": (tokenizer_folder and tokenizer_sha256(tokenizer_folder)) or "",
        "tokenizer": str(tokenizer_folder or ""),
        "dataset": str(dataset),
        "stats_sha256": sha256(stats) if stats.is_file() else "",
        "grid": list(grid),
        "latent_channels": tokenizer.config.latent_channels,
        "copies": copies,
        "symmetries": symmetries,
        "seed": seed,
        **(inputs or {}),
    }
    with ExitStack() as stack:
        files = {split: stack.enter_context(new_hdf5(folder / f"{split}.hdf5")) for split in SPLITS}
        for file in files.values():
            file.attrs.update(origin)
        for (split, record, copy, symmetry, start), (z_BCxyz, solid_11XYZ) in zip(
            progress(jobs, "encode latents", len(jobs)), encoded, strict=True
        ):
            name = f"{record.path.name}.{record.sample:04d}.{copy:04d}"
            if not start:
                _new_group(files[split], name, record, tokenizer, solid_11XYZ, copy, symmetry)
            stop = start + len(z_BCxyz)
            if not z_BCxyz.isfinite().all():
                raise UserError(
                    f"{record.path}: the latents of snapshots {start} to {stop - 1} of trajectory {record.sample} are "
                    "not finite: the data differ too much from those that the tokenizer was trained on; train another"
                )
            group = files[split][name]
            group["z"][start:stop] = z_BCxyz.numpy()
            if stop == record.n_snapshots:
                group.attrs["mean_squared_change"] = mean_squared_change(torch.from_numpy(group["z"][:]))


def _new_group(
    file: h5py.File,
    name: str,
    record: TrajectoryRecord,
    tokenizer: Tokenizer,
    solid_11XYZ: Tensor,
    copy: int,
    symmetry: Symmetry,
) -> None:
    """Create the group of a trajectory. The latents ``z`` are allocated but not filled."""
    group = file.create_group(name)
    group.attrs.update(domain=record.domain, source=record.path.name, sample=record.sample, copy=copy)
    group.attrs.update(shift=symmetry.shift, mirror=symmetry.mirror, order=symmetry.order)
    # Symmetries move no wall and exchange periodic axes alone, so a copy has the same boundaries.
    group.attrs["boundaries"] = codes_of(record.boundaries)
    latent_grid = [size // COMPRESSION for size in record.grid]
    shape = (record.n_snapshots, tokenizer.config.latent_channels, *latent_grid)
    # Stored contiguously: reading chunks with checksums takes 16 times as long, and training waits for it.
    group.create_dataset("z", shape, "float32")
    group["geometry"] = tokenizer.encode_geometry(solid_11XYZ)[0].cpu().numpy()
    group["solid_fraction"] = F.avg_pool3d(solid_11XYZ, COMPRESSION)[0, 0].cpu().numpy()


def latent_inputs(config: Config, paths: Paths) -> Inputs:
    """What the latents of a config depend on, as `encode_dataset` records it and `inputs_of_latents` reads it."""
    c = config.tokenizer
    made = {"copies": c.latent_copies, "symmetries": c.latent_symmetries, "seed": tokenizer_seed(config)}
    tokenizer = {"tokenizer_sha256": tokenizer_sha256(paths.tokenizer) or ""}
    return {**data_inputs(config, paths), **tokenizer, "latents_version": LATENTS_VERSION, **made}


def trajectory_fields(trajectory: Trajectory) -> Tensor:
    """Convert a data trajectory to encoder input, float32 [T, 5, X, Y, Z]: velocity, pressure, solid mask."""
    velocity, pressure, solid = (
        torch.from_numpy(array)
        for array in (trajectory.velocity_T3XYZ, trajectory.pressure_T1XYZ, trajectory.solid_1XYZ)
    )
    return torch.cat([velocity, pressure, solid.expand(len(velocity), -1, -1, -1, -1)], dim=1)
