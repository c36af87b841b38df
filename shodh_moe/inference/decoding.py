"""Decode cached latents to flow fields, and write them as a dataset in the_well's schema.

Shapes: B snapshots, C latent channels, x y z latent grid, X Y Z space.
"""

from __future__ import annotations

from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import require_made, require_writable, whole_folder
from shodh_moe.base.progress import progress
from shodh_moe.config import COMPRESSION, Config
from shodh_moe.config.paths import resolve_paths
from shodh_moe.data import TrajectoryKey, TrajectoryRecord, read_snapshots, trajectories_by_source
from shodh_moe.data.opening import opened
from shodh_moe.data.prediction_file import FACES, new_prediction
from shodh_moe.data.storage import free_bytes
from shodh_moe.kernels import divergence
from shodh_moe.metrics.fields import divergence_moments, pooled_divergence
from shodh_moe.tokenizer import Tokenizer, load_tokenizer
from shodh_moe.tokenizer.latents import LatentTrajectory, load_latents
from shodh_moe.tokenizer.tokenizer import tokenizer_sha256

VOXELS = 2**21  # number of voxels to decode at a time: one snapshot of 128^3


@torch.no_grad()
def decode_latents(config: Config, split: str, output: Path, dtype: str = "float32") -> None:
    """Decode the cached latents of a split to ``output/data/<split>``, one file for each file of the dataset.

    Only the untransformed copy of each trajectory is decoded. With the operator ``staggered`` the files also hold
    ``velocity_face``, the velocity on the faces, whose divergence vanishes. Prints one line per file.

    Args:
        dtype: ``float32`` or ``float64``, in which the velocity is made divergence-free and stored.

    Raises:
        UserError: ``output`` exists or cannot be written, there is no tokenizer or no latents, these are damaged or
            belong to another tokenizer or other data, or a field is not finite. Nothing is written in these cases.
    """
    if output.exists():
        raise UserError(f"--output {output} exists: give a new folder, or remove it")
    require_writable(output.parent)
    paths = resolve_paths(config)
    tokenizer = load_tokenizer(paths.tokenizer)
    require_made(paths.latents, "shodh tokenizer encode")
    latents = [one for one in load_latents(paths.latents, split, paths.tokenizer) if not one.copy]
    by_source = trajectories_by_source(paths.dataset, split, config.data.grid, config.data.skip_bad)
    pairs = _by_file(latents, by_source, paths.dataset)
    faces = tokenizer.config.operator == "staggered"
    _require_space(output, latents, config.data.grid, 7 if faces else 4, dtype)
    provenance = {
        "tokenizer_sha256": tokenizer_sha256(paths.tokenizer),
        "divergence_operator": tokenizer.config.operator,
        "walls": tokenizer.config.walls,
        "decoder": tokenizer.config.decoder,
        "dtype": dtype,
        "package_version": version("shodh_moe"),
    }
    tokenizer = tokenizer.to("cuda" if torch.cuda.is_available() else "cpu")
    lines = []
    with whole_folder(output) as folder:
        for name, of_file in progress(pairs.items(), "decode latents", len(pairs)):
            records, place = [record for record, _ in of_file], Path("data", split, name)
            own = {**provenance, "input": name}
            with new_prediction(folder / place, records, _time(records), dtype, own, "reconstruction", faces) as file:
                relative = _fill(file, of_file, tokenizer, dtype)
                file["provenance"].attrs["divergence_rms_relative"] = relative
            lines.append(
                f"[tokenizer decode] {output / place}: {len(records)} x {records[0].n_snapshots} snapshots, "
                f"h rms(div u) / rms(u) = {relative:.1e} ({tokenizer.config.operator}, as stored in {dtype})"
            )
    print("\n".join(lines))


def _by_file(
    latents: list[LatentTrajectory], records: dict[TrajectoryKey, TrajectoryRecord], dataset: Path
) -> dict[str, list[tuple[TrajectoryRecord, LatentTrajectory]]]:
    """Group the trajectories by data file, in order. Raises: UserError: the dataset lacks one of them."""
    pairs = defaultdict(list)
    for one in sorted(latents, key=lambda latent: (latent.source, latent.sample)):
        record = records.get((one.source, one.sample))
        if record is None or record.n_snapshots != one.snapshots:
            found = f"{record.n_snapshots} snapshots" if record else "no such trajectory"
            raise UserError(
                f"latents {one.z.file.filename} have {one.snapshots} snapshots of trajectory {one.sample} of "
                f"{one.source}, the dataset {dataset} has {found}: encode it again, or set data.path to theirs"
            )
        pairs[one.source].append((record, one))
    return dict(pairs)


def _fill(
    file: h5py.File, pairs: list[tuple[TrajectoryRecord, LatentTrajectory]], tokenizer: Tokenizer, dtype: str
) -> float:
    """Decode trajectories into a new file; return h rms(div u) / rms(u) of the stored velocity, h = 1 cell."""
    moments: list[Tensor] = []
    operator = tokenizer.config.operator
    for row, (record, latent) in enumerate(pairs):
        solid_11XYZ = _solid(record, latent).to(tokenizer.velocity_rms.device)
        batch = max(1, VOXELS // solid_11XYZ.numel())
        for start in range(0, latent.snapshots, batch):
            z_BCxyz = latent.read(start, start + batch).to(solid_11XYZ.device)
            solid_B1XYZ = solid_11XYZ.expand(len(z_BCxyz), -1, -1, -1, -1)
            flow = tokenizer.decode(z_BCxyz, solid_B1XYZ, getattr(torch, dtype))
            stored = {"t1_fields/velocity": flow.velocity_B3XYZ, "t0_fields/pressure": flow.pressure_B1XYZ}
            if FACES in file["t1_fields"]:
                stored[f"t1_fields/{FACES}"] = flow.conserved_B3XYZ
            if not all(values.isfinite().all() for values in stored.values()):
                raise UserError(
                    f"latents {latent.z.file.filename}: a field decoded from snapshots {start} to "
                    f"{start + len(z_BCxyz) - 1} of trajectory {record.sample} of {latent.source} is not finite: "
                    "train another tokenizer, or encode again"
                )
            for name, values in stored.items():
                last = values.movedim(1, -1).cpu().numpy()
                file[name][row, start : start + len(last)] = last if name.startswith("t1") else last[..., 0]
            u_B3XYZ = flow.conserved_B3XYZ.double()
            moments += map(divergence_moments, divergence(u_B3XYZ, operator), u_B3XYZ)
    return pooled_divergence(torch.stack(moments), spacing=1.0)["rms_relative"]


def _solid(record: TrajectoryRecord, latent: LatentTrajectory) -> Tensor:
    """Read the solid mask, float32 [1, 1, X, Y, Z]. Raises: UserError: the latents were made with another mask."""
    solid_11XYZ = torch.from_numpy(read_snapshots(record, 0, 1)[1])[None]
    if not torch.allclose(F.avg_pool3d(solid_11XYZ, COMPRESSION)[0, 0], latent.solid_fraction_xyz, atol=1e-5):
        raise UserError(
            f"{record.path} has other solids than the latents {latent.z.file.filename} were made with: encode this "
            "dataset again, or set data.path to theirs"
        )
    return solid_11XYZ


def _time(records: list[TrajectoryRecord]) -> NDArray[np.float32]:
    """Read the times of the snapshots, [T] or one row per trajectory [., T]; their numbers if the file has no times."""
    with opened(records[0].path) as file:
        if "dimensions/time" not in file:
            return np.arange(records[0].n_snapshots, dtype=np.float32)
        time = np.asarray(file["dimensions/time"], dtype=np.float32)
    return time[[record.sample for record in records]] if time.ndim == 2 else time


def _require_space(output: Path, latents: list[LatentTrajectory], grid: list[int], components: int, dtype: str) -> None:
    snapshots = sum(one.snapshots for one in latents)
    needed = snapshots * components * int(np.prod(grid)) * np.dtype(dtype).itemsize
    if needed > free_bytes(output):
        raise UserError(
            f"--output {output} needs {needed / 1e9:.3g} GB, {free_bytes(output) / 1e9:.3g} GB are free there: free "
            "some, choose another disk, or --dtype float32"
        )
