"""Continue a user's own flow from given snapshots, and write it in the_well's schema and for ParaView.

Shapes: B trajectories, H given snapshots, N predicted ones, X Y Z space.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import require_writable, sha256
from shodh_moe.base.progress import progress
from shodh_moe.data import TrajectoryRecord, open_trajectories, read_snapshots
from shodh_moe.data.opening import opened
from shodh_moe.data.prediction_file import (
    FACES,
    PRESSURE_SPREAD,
    VELOCITY_SPREAD,
    axis_names,
    new_prediction,
    unknown_fields,
)
from shodh_moe.inference.contexts import context_rows, contexts_of
from shodh_moe.inference.loading import ModelSource, find_source, load_source
from shodh_moe.inference.members import continue_by_members, load_members
from shodh_moe.inference.model import Model
from shodh_moe.inference.paraview import SPREAD, new_vtkhdf, put
from shodh_moe.inference.unlikeness import fit_unlikeness
from shodh_moe.kernels import divergence
from shodh_moe.metrics.ensemble import LEVELS, coverage
from shodh_moe.metrics.fields import divergence_report, nrmse, vrmse
from shodh_moe.model.stride import require_stride
from shodh_moe.tokenizer.tokenizer import tokenizer_sha256

UNEVEN = 1e-3  # time steps and grid spacings with a smaller relative difference count as equal


@dataclass(frozen=True)
class Request:
    """What to predict.

    Attributes:
        input: an HDF5 file in the_well's schema.
        output: the new file; the ParaView files get its name.
        steps: number of snapshots to predict, N.
        start: index of the first of the H snapshots that the model is given.
        sample: index of one trajectory of the file; None for all.
        dtype: dtype of the stored fields; the velocity is made divergence-free in float64 either way.
        paraview: whether to write the ``.vtkhdf`` files.
        overwrite: whether existing files may be replaced.
        members: further models, which with the first one form an ensemble.
        stride: number of the input's time steps from one given or predicted snapshot to the next, one of the model's
            ``strides``; None: the first of them.
    """

    input: Path
    output: Path
    steps: int
    start: int = 0
    sample: int | None = None
    dtype: str = "float32"
    paraview: bool = True
    overwrite: bool = False
    members: tuple[Path | str, ...] = ()
    stride: int | None = None


@dataclass(frozen=True)
class _Axes:
    """Times of the input [T] or [B, T], their step, the centre of the first cell, and the cell spacing."""

    time: NDArray[np.float64]
    time_step: float
    origin: list[float]
    spacing: list[float]


@dataclass
class _Scores:
    """Errors and divergence of a prediction.

    Attributes:
        errors: for each predicted snapshot and trajectory: nRMSE of model and persistence, VRMSE of model and
            persistence; of an ensemble also the velocity's spread over the truth, and the share of its values within
            the interval for 90 %.
        decoded, stored: largest relative divergence of any snapshot, as decoded in float64 and as stored.
    """

    errors: dict[int, list[list[float]]] = field(default_factory=dict)
    decoded: float = 0.0
    stored: float = 0.0


def predict(checkpoint: Path | str, request: Request, tokenizer: Path | None = None) -> None:
    """Roll out the requested trajectories of ``request.input``, write the prediction, and print its errors.

    If the input also holds the true snapshots, errors are printed beside those of persistence. For the operator
    ``staggered`` the file also holds ``t1_fields/velocity_face`` on the lower faces of the voxels, whose divergence
    vanishes; ``velocity`` is its mean at the voxel centres. With ``members`` all fields are means over the ensemble,
    and ``velocity_spread`` and ``pressure_spread`` its standard deviations.

    Raises:
        UserError: request, input or model cannot be used, or the prediction is not finite. Nothing is written then.
    """
    records = _checked_records(request)
    axes = _checked_axes(request.input, records[0].n_snapshots)
    source = find_source(checkpoint, tokenizer)
    model = load_source(source)
    stride = model.strides[0] if request.stride is None else request.stride
    require_stride(stride, model.strides)
    request = replace(request, stride=stride)
    _require_fit(request, records[0], model, source, axes)
    members = load_members(source, model, request.members, tokenizer, stride)
    _warn_of_fields(request.input)
    unlike = _warn_of_unlike(request, records, model, source)
    last = _given(request, model)[-1]
    # Continue from the last given time, so that rounding does not accumulate over the input's own steps.
    first = axes.time[..., last : last + 1]
    time = (first + axes.time_step * stride * np.arange(1, request.steps + 1)).astype(np.float32)
    time = time[[record.sample for record in records]] if time.ndim == 2 else time
    scores = _Scores()
    with ExitStack() as stack, torch.no_grad():
        provenance = {**_provenance(source, model, request), **unlike}
        if len(members) > 1:
            provenance["members_weights_sha256"] = [one.weights_sha256 for one in members]
        faces = model.tokenizer.config.operator == "staggered"
        spread = len(members) > 1
        new = new_prediction(request.output, records, time, request.dtype, provenance, faces=faces, spread=spread)
        file = stack.enter_context(new)
        views = []
        for row, (record, path) in enumerate(zip(records, _companions(request, records), strict=False)):
            _, solid_1XYZ = read_snapshots(record, request.start, request.start + 1)
            own_time = time[row] if time.ndim == 2 else time
            view = new_vtkhdf(path, own_time, solid_1XYZ[0], axes.origin, axes.spacing, spread)
            views.append(stack.enter_context(view))
        work = _snapshots(members, records, request, scores)
        for row, step, fields_4XYZ, conserved_3XYZ, spread_4XYZ in progress(
            work, "predict", len(records) * request.steps
        ):
            file["t1_fields/velocity"][row, step] = np.moveaxis(fields_4XYZ[:3], 0, -1)
            if faces:
                file["t1_fields"][FACES][row, step] = np.moveaxis(conserved_3XYZ, 0, -1)
            file["t0_fields/pressure"][row, step] = fields_4XYZ[3]
            if spread:
                file["t1_fields"][VELOCITY_SPREAD][row, step] = np.moveaxis(spread_4XYZ[:3], 0, -1)
                file["t0_fields"][PRESSURE_SPREAD][row, step] = spread_4XYZ[3]
            if views:
                put(views[row], step, fields_4XYZ)
                if spread:
                    put(views[row], step, spread_4XYZ, SPREAD)
    _report(request, model, scores, time, len(records))


def _snapshots(
    members: list[Model], records: list[TrajectoryRecord], request: Request, scores: _Scores
) -> Iterator[tuple[int, int, NDArray[np.floating], NDArray[np.floating], NDArray[np.floating]]]:
    """Yield trajectory, step, fields [4, X, Y, Z], conserved velocity [3, X, Y, Z] and spread [4, X, Y, Z] as stored.

    Extends ``scores``.
    """
    model = members[0]
    given, stride = _given(request, model), request.stride or 1
    for row, record in enumerate(records):
        fields_H4XYZ, solid_1XYZ = _read_given(record, given)
        flow = continue_by_members(members, fields_H4XYZ, solid_1XYZ, stride)
        for step, (exact_4XYZ, conserved_3XYZ, spread_4XYZ) in zip(range(request.steps), flow, strict=False):
            if not exact_4XYZ.isfinite().all():
                raise UserError(
                    f"the prediction of trajectory {record.sample} is no longer finite at step {step + 1}: the flow is "
                    "too far from the training data; ask for fewer --steps"
                )
            dtype, operator = getattr(torch, request.dtype), model.tokenizer.config.operator
            stored_4XYZ, stored_3XYZ = exact_4XYZ.to(dtype), conserved_3XYZ.to(dtype)
            scores.decoded = max(scores.decoded, _divergence(conserved_3XYZ, operator))
            scores.stored = max(scores.stored, _divergence(stored_3XYZ.double(), operator))
            place = given[-1] + (step + 1) * stride
            if place < record.n_snapshots:
                true_T4XYZ, _ = read_snapshots(record, place, place + 1)
                truth, last = torch.from_numpy(true_T4XYZ[0, :3]).double(), fields_H4XYZ[-1, :3].double()
                errors = [float(measure(u, truth)) for measure in (nrmse, vrmse) for u in (exact_4XYZ[:3], last)]
                if len(members) > 1:
                    errors.append(float(spread_4XYZ[:3].square().mean().sqrt() / truth.square().mean().sqrt()))
                    errors.append(coverage(exact_4XYZ[:3], spread_4XYZ[:3], truth, LEVELS[-1], len(members)))
                scores.errors.setdefault(step, []).append(errors)
            yield row, step, stored_4XYZ.numpy(), stored_3XYZ.numpy(), spread_4XYZ.to(dtype).numpy()


def _given(request: Request, model: Model) -> range:
    """Indices of the snapshots that the model is given."""
    stride = request.stride or 1
    return range(request.start, request.start + model.history * stride, stride)


def _read_given(record: TrajectoryRecord, given: range) -> tuple[Tensor, Tensor]:
    """Return the given snapshots [H, 4, X, Y, Z] and the solid mask [1, X, Y, Z]."""
    fields_T4XYZ, solid_1XYZ = read_snapshots(record, given[0], given[-1] + 1)
    return torch.from_numpy(fields_T4XYZ[:: given.step].copy()), torch.from_numpy(solid_1XYZ)


def _divergence(u_3XYZ: Tensor, operator: str) -> float:
    return divergence_report(divergence(u_3XYZ[None], operator)[0], u_3XYZ, spacing=1.0)["rms_relative"]


def _checked_records(request: Request) -> list[TrajectoryRecord]:
    """Return the trajectories to continue, after all checks that need no model. Raises: UserError: one has failed."""
    if request.steps < 1:
        raise UserError(f"--steps {request.steps}: predict at least 1 snapshot")
    if request.start < 0:
        raise UserError(f"--start {request.start}: snapshots count from 0")
    if request.output.suffix not in (".hdf5", ".h5"):
        raise UserError(f"--output {request.output}: give a file name that ends in .hdf5")
    records = open_trajectories(request.input)
    if request.sample is not None:
        if not 0 <= request.sample < len(records):
            raise UserError(f"--sample {request.sample}: {request.input} has trajectories 0 to {len(records) - 1}")
        records = [records[request.sample]]
    if request.output.exists() and request.output.samefile(request.input):
        raise UserError(f"--output {request.output} is the input: give another name")
    existing = [path for path in (request.output, *_companions(request, records)) if path.exists()]
    if existing and not request.overwrite:
        raise UserError(f"{existing[0]} exists: give another --output, or --overwrite to replace it")
    require_writable(request.output.parent)
    return records


def _companions(request: Request, records: list[TrajectoryRecord]) -> list[Path]:
    """Return the paths of the ParaView files, one per trajectory; [] if none are wanted."""
    if not request.paraview:
        return []
    if len(records) == 1:
        return [request.output.with_suffix(".vtkhdf")]
    return [request.output.with_suffix(f".trajectory{record.sample}.vtkhdf") for record in records]


def _checked_axes(path: Path, snapshots: int) -> _Axes:
    """Read times and coordinates. Raises: UserError: the times are missing, or either are not evenly spaced."""
    with opened(path) as file:
        if "dimensions/time" not in file:
            raise UserError(f"{path} has no dimensions/time: the model needs the times of the snapshots; add them")
        time = np.asarray(file["dimensions/time"], dtype=np.float64)
        places = [file.get(f"dimensions/{axis}") for axis in axis_names(file)]
        coordinates = [None if place is None else np.asarray(place, dtype=np.float64) for place in places]
    if time.ndim not in (1, 2) or time.shape[-1] != snapshots:
        raise UserError(f"{path}: dimensions/time has shape {time.shape}, the fields have {snapshots} snapshots")
    time_step = _even_step(time)
    if not time_step:
        raise UserError(
            f"{path}: dimensions/time needs at least two snapshots at a constant time step: the model knows one step "
            "only; resample"
        )
    origin, spacing = [0.5, 0.5, 0.5], [1.0, 1.0, 1.0]
    if all(places_X is not None for places_X in coordinates):
        steps = [_even_step(places_X) for places_X in coordinates if places_X is not None]
        if not all(steps) or max(steps) - min(steps) > UNEVEN * max(steps):
            raise UserError(
                f"{path}: the grid is not evenly spaced, or not by the same distance along all axes (spacings {steps}; "
                "0: uneven): the model needs cubic cells; resample"
            )
        origin, spacing = [float(places_X[0]) for places_X in coordinates if places_X is not None], steps
    return _Axes(time, time_step, origin, spacing)


def _even_step(values: NDArray[np.float64]) -> float:
    """Return the step along the last axis; 0 if the values are not ascending and evenly spaced."""
    steps = np.diff(values, axis=-1)
    if steps.size == 0 or not np.isfinite(values).all():
        return 0.0
    # Large times stored as float32 are evenly spaced only up to rounding.
    allowed = UNEVEN * abs(steps.mean()) + 4 * np.finfo(np.float32).eps * np.abs(values).max()
    even = steps.min() > 0 and np.ptp(steps) <= allowed
    return float(steps.mean()) if even else 0.0


def _require_fit(request: Request, record: TrajectoryRecord, model: Model, source: ModelSource, axes: _Axes) -> None:
    if list(record.grid) != model.tokenizer.grid:
        raise UserError(
            f"{request.input} has grid {list(record.grid)}, the model was trained on {model.tokenizer.grid} and works "
            "on that alone: resample the input"
        )
    given = _given(request, model)
    if given[-1] >= record.n_snapshots:
        apart = f", each {given.step} after the one before," if given.step > 1 else ""
        remedy = "smaller --start" if given.step == 1 else "smaller --start or --stride"
        raise UserError(
            f"{request.input} has {record.n_snapshots} snapshots, the model needs {len(given)}{apart} from --start "
            f"{request.start} on: give a longer file or a {remedy}"
        )
    data = source.config.data
    trained = {float(domain.steps_per_snapshot) for _, domain in data.domains.items()}
    if not data.path and not any(abs(axes.time_step - step) <= UNEVEN * step for step in trained):
        known = ", ".join(f"{step:g}" for step in sorted(trained))
        print(f"warning: the time step of {request.input} is {axes.time_step:g}, the model was trained with {known}")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _warn_of_fields(path: Path) -> None:
    """Warn of fields of the input that the model does not see."""
    if unknown := unknown_fields(path):
        _warn(f"{path} has the field {', '.join(unknown)}, which the model does not have and leaves out")


@torch.no_grad()
def _warn_of_unlike(
    request: Request, records: list[TrajectoryRecord], model: Model, source: ModelSource
) -> dict[str, Any]:
    """Warn of trajectories that are unlike all training domains; return what the provenance records."""
    contexts = contexts_of(source)
    if contexts is None:
        _warn(f"{source.path} records no contexts of its training data and cannot tell whether the input is like them")
        return {}
    fitted, history = fit_unlikeness(contexts), model.transformer.config.history
    scores, domains = [], []
    for record in records:
        z_HCxyz, geometry_1Cxyz = model.encode_flow(*_read_given(record, _given(request, model)))
        z_BSI = model.transformer.embedding_inputs(z_HCxyz[None], geometry_1Cxyz)
        score_B, nearest_B = fitted.score(context_rows(z_BSI, history).cpu())
        scores.append(float(score_B))
        domains.append(fitted.domains[int(nearest_B)])
        if scores[-1] > 1:
            _warn(
                f"trajectory {record.sample} of {request.input} is unlike all training data of {source.path} "
                f"({scores[-1]:.1f} times the limit; the nearest domain is {domains[-1]}): expect larger errors than "
                "those of the model card, or fine-tune the model"
            )
    return {"unlikeness": scores, "nearest_domain": domains}


def _provenance(source: ModelSource, model: Model, request: Request) -> dict[str, Any]:
    return {
        "model": source.config.name,
        "checkpoint_step": model.step,
        "checkpoint_weights_sha256": model.weights_sha256,
        "tokenizer_sha256": tokenizer_sha256(source.tokenizer_folder()),
        "input": request.input.name,
        "input_sha256": sha256(request.input),
        "start": request.start,
        "given_snapshots": model.transformer.config.history,
        "stride": request.stride,
        "steps": request.steps,
        "trajectories": "all" if request.sample is None else request.sample,
        "divergence_operator": model.tokenizer.config.operator,
        "walls": model.tokenizer.config.walls,
        "curl_dtype": "float64",
        "package_version": version("shodh_moe"),
    }


def _report(request: Request, model: Model, scores: _Scores, time: NDArray[np.float32], trajectories: int) -> None:
    """Print files, errors and divergence."""
    if scores.errors:
        print(f"velocity error against the input's own later snapshots, mean over {trajectories} trajectories")
        more = f" {'spread':>8} {'within 90 %':>12}" if request.members else ""
        print(f"{'step':>6} {'time':>12} {'nRMSE':>10} {'persistence':>12} {'VRMSE':>10} {'persistence':>12}{more}")
        for step, errors in sorted(scores.errors.items()):
            own, still, own_v, still_v, *ensemble = np.mean(errors, axis=0)
            when = float(np.atleast_2d(time)[0, step])
            more = f" {ensemble[0]:>8.4f} {ensemble[1]:>12.3f}" if ensemble else ""
            print(f"{step + 1:>6} {when:>12g} {own:>10.4f} {still:>12.4f} {own_v:>10.4f} {still_v:>12.4f}{more}")
    stored = f", {scores.stored:.1e} as stored in {request.dtype}" if request.dtype != "float64" else ""
    operator = model.tokenizer.config.operator
    where = " on faces" if operator == "staggered" else ""
    print(
        f"divergence of the velocity{where}, {operator} operator, h rms(div u) / rms(u), h = 1 cell, "
        f"largest of all snapshots: {scores.decoded:.1e} decoded in float64{stored}"
    )
    print(f"[predict] {request.output}: {trajectories} x {request.steps} snapshots")
