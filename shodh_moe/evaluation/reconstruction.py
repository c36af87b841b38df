"""Evaluate a tokenizer: how well it reconstructs the snapshots of a split, and in what time.

Snapshots are read, encoded and decoded in batches and compared one by one in float64; only their scores are kept. A
direct decoder is also measured with its velocity projected, that is, made divergence-free afterwards.

Shapes: B batch, X Y Z space, N snapshots.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import finite_json, require_made, require_writable, write_text
from shodh_moe.base.progress import progress
from shodh_moe.config import Config
from shodh_moe.config.paths import resolve_paths
from shodh_moe.data import FieldStats, list_trajectories
from shodh_moe.data.loader import Snapshots
from shodh_moe.data.stats import STATS_FILE
from shodh_moe.evaluation.divergence import NORM, differentiated
from shodh_moe.kernels import divergence
from shodh_moe.kernels.differentiation import OPERATORS
from shodh_moe.metrics.fields import band_errors, divergence_moments, nrmse, pooled_divergence, vrmse
from shodh_moe.metrics.seams import block_power, face_jumps
from shodh_moe.tokenizer import Tokenizer, load_tokenizer
from shodh_moe.tokenizer.batches import on_device
from shodh_moe.tokenizer.helmholtz import at_centres, conserved_velocity
from shodh_moe.tokenizer.tokenizer import Flow, tokenizer_sha256

# Maximum number of snapshots measured per domain, evenly spaced; more would change the metrics little.
MOST = 32
# Walls and operator of each projection of a direct decoder's velocity. (Exact walls with central4 take too long.)
PROJECTIONS = (*(("none", operator) for operator in OPERATORS), ("exact", "staggered"), ("exact", "central2"))
DTYPES = {"float32": torch.float32, "float64": torch.float64}
# Scores of one snapshot by name: means, or sums that `_summary` combines.
Scores = dict[str, Tensor]


@torch.no_grad()
def evaluate_tokenizer(config: Config, split: str, output: Path | None = None) -> dict[str, Any]:
    """Measure the config's tokenizer on a split of its dataset, write JSON, print a table, and return the JSON content.

    The content has for each domain, over at most `MOST` snapshots: errors of velocity and pressure as `metrics.fields`
    defines them (means over snapshots; ``_mse`` of fields divided by their training rms), spectral bands, seams of the
    decoder's blocks by axis (``jumps`` and ``power``: the ratios of `metrics.seams`, 1 without seams), divergence under
    every operator after decoding in float32 and in float64, velocity in solid voxels (null without any), and median
    milliseconds per sample. For a direct decoder without a divergence penalty, ``projected`` has the same for each of
    `PROJECTIONS`.

    Divergences are computed in float64 and pooled over snapshots. The decoder's own operator is applied to the velocity
    that it conserves, any other to the velocity at the voxels' centres. For ``staggered`` the latter is averaged to the
    faces, including those of solid voxels, which gives the figures of ``central2`` (see `differentiated`).

    Args:
        config: the config whose tokenizer is measured.
        split: ``train``, ``valid`` or ``test``.
        output: the JSON file; None for ``evaluation.json`` in the tokenizer's folder.

    Raises:
        UserError: tokenizer or dataset are missing, damaged or of different grids, or the file cannot be written.
    """
    paths = resolve_paths(config)
    tokenizer = load_tokenizer(paths.tokenizer)
    target = _target(paths.tokenizer, output)
    require_made(paths.dataset / STATS_FILE, "shodh data generate")
    other_data = _trained_on_other_data(tokenizer, FieldStats.load(paths.dataset))
    if other_data:
        print(f"[tokenizer] {paths.tokenizer} was trained on other data than {paths.dataset}: its statistics are used")
    records = list_trajectories(paths.dataset, split, config.data.grid, config.data.skip_bad)
    snapshots, device = Snapshots(records), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer.to(device)
    domains: dict[str, Any] = {}
    projected: dict[str, Any] = defaultdict(dict)
    for number, domain in enumerate(snapshots.domains):
        found = _measure_domain(tokenizer, snapshots, number, config.tokenizer.batch_size, device)
        domains[domain] = {**found.pop(""), "n_snapshots_of_split": snapshots.sizes[number]}
        for name, result in found.items():
            projected[name][domain] = result
    settings = tokenizer.config.model_dump(exclude={"path", "root"})
    result = finite_json(
        {
            "tokenizer": str(paths.tokenizer),
            "sha256": tokenizer_sha256(paths.tokenizer),
            "dataset": str(paths.dataset),
            "split": split,
            "grid": config.data.grid,
            "trained_on_other_data": other_data,
            "settings": settings,
            "parameters": sum(p.numel() for p in tokenizer.parameters()),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "batch_size": config.tokenizer.batch_size,
            "snapshots": f"at most {MOST} of a domain, evenly spread",
            "divergence_norm": NORM,
            "domains": domains,
            **({"projected": dict(projected)} if projected else {}),
        }
    )
    write_text(target, json.dumps(result, indent=2) + "\n")
    print(_table(result))
    print(f"[tokenizer] {target}")
    return result


def _target(folder: Path, output: Path | None) -> Path:
    target = output or folder / "evaluation.json"
    if target.is_dir():
        raise UserError(f"--output {target} is a folder: give the name of a file")
    try:
        require_writable(target.parent)
    except UserError as error:
        raise error if output else UserError(f"{error}, or give a file with --output") from error
    return target


def _trained_on_other_data(tokenizer: Tokenizer, stats: FieldStats) -> bool:
    """Whether the statistics stored in the tokenizer differ from the dataset's by more than rounding to float32."""
    pairs = ((tokenizer.velocity_rms, stats.velocity_rms), (tokenizer.pressure_rms, stats.pressure_rms))
    return any(abs(float(own) - theirs) > 1e-6 * theirs for own, theirs in pairs)


def _measure_domain(
    tokenizer: Tokenizer, snapshots: Snapshots, domain: int, batch_size: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Return a domain's scores: the decoder's under "", those of a direct decoder's projections as "walls/operator"."""
    picks = spread(snapshots.of_domain(domain), MOST)
    parts = [picks[first : first + batch_size] for first in range(0, len(picks), batch_size)]
    rms = float(tokenizer.velocity_rms), float(tokenizer.pressure_rms)
    scores: dict[str, list[Scores]] = defaultdict(list)
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    batches = on_device(snapshots, parts, device)
    for fields_B5XYZ in progress(batches, f"evaluate {snapshots.domains[domain]}", len(parts)):
        solid_B1XYZ = fields_B5XYZ[:, 4:]
        z = _timed(times["", "encode"], tokenizer.encode, fields_B5XYZ)
        flow = _timed(times["", "decode"], tokenizer.decode, z, solid_B1XYZ)
        for i in range(len(z)):
            exact = tokenizer.decode(z[i : i + 1], solid_B1XYZ[i : i + 1], torch.float64)
            own = {"float32": _one(flow, i), "float64": exact}
            scores[""].append(_score(own, tokenizer.config.operator, fields_B5XYZ[i : i + 1], rms))
        if tokenizer.config.decoder != "direct" or tokenizer.config.divergence_weight:
            continue
        for walls, operator in PROJECTIONS:
            name = f"{walls}/{operator}"
            # The velocity comes first: `_timed` divides by the length of the first argument.
            single = _timed(times[name, "project"], _project, flow.velocity_B3XYZ, flow, solid_B1XYZ, operator, walls)
            for i in range(len(z)):
                one = _one(flow, i)
                wide_13XYZ = one.velocity_B3XYZ.double()
                exact = _project(wide_13XYZ, one, solid_B1XYZ[i : i + 1], operator, walls)
                both = {"float32": _one(single, i), "float64": exact}
                scores[name].append(_score(both, operator, fields_B5XYZ[i : i + 1], rms))
    return {
        name: {
            **_summary(rows),
            "ms_per_sample": {what: statistics.median(ms) for (whose, what), ms in times.items() if whose == name},
            "n_snapshots": len(rows),
        }
        for name, rows in scores.items()
    }


def spread(items: list[int], most: int) -> list[int]:
    """Return all items, or ``most`` evenly spaced ones including the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _timed(times: list[float], run: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``run(*arguments)``, and append its milliseconds per sample of the first argument to ``times``."""

    def wait() -> None:
        if arguments[0].is_cuda:
            torch.cuda.synchronize()

    if not times:
        run(*arguments)  # warm up: algorithms are chosen, kernels compiled, memory allocated
    wait()
    began = time.perf_counter()
    result = run(*arguments)
    wait()
    times.append(1e3 * (time.perf_counter() - began) / len(arguments[0]))
    return result


def _project(w_B3XYZ: Tensor, flow: Flow, solid_B1XYZ: Tensor, operator: str, walls: str) -> Flow:
    """Replace the velocity of ``flow`` by w, projected to be divergence-free."""
    conserved = conserved_velocity(w_B3XYZ, solid_B1XYZ, operator, walls)
    return Flow(at_centres(conserved, operator), flow.pressure_B1XYZ, conserved)


def _one(flow: Flow, index: int) -> Flow:
    return Flow(*(values[index : index + 1] for values in flow))


def _score(decoded: dict[str, Flow], own: str, fields_15XYZ: Tensor, rms: tuple[float, float]) -> Scores:
    """Score one snapshot, decoded in both dtypes and conserving with the operator ``own``, against the truth."""
    exact, true_15XYZ = decoded["float64"], fields_15XYZ.double()
    solid_1XYZ = true_15XYZ[:, 4] > 0.5
    found: Scores = {}
    true_fields = true_15XYZ[:, :3], true_15XYZ[:, 3:4]
    for name, values, true, scale in zip(("velocity", "pressure"), exact[:2], true_fields, rms, strict=True):
        found[f"{name}_vrmse"] = vrmse(values, true)[0]
        found[f"{name}_mse"] = ((values - true) / scale).square().mean()
        found[f"{name}_bands"] = band_errors(values, true)[0]
        found[f"{name}_jumps"], found[f"{name}_power"] = face_jumps(values - true)[0], block_power(values - true)[0]
    found["velocity_nrmse"] = nrmse(exact.velocity_B3XYZ, true_fields[0])[0]
    for dtype, flow in decoded.items():
        for operator in OPERATORS:
            u = flow.conserved_B3XYZ if operator == own else differentiated(flow.velocity_B3XYZ, operator)
            found[f"{operator}/{dtype}"] = divergence_moments(divergence(u.double(), operator), u)
    square_1XYZ = exact.velocity_B3XYZ.square().sum(1)
    inside = torch.where(solid_1XYZ, square_1XYZ, 0.0)
    found["solid"] = torch.stack([inside.sum(), solid_1XYZ.sum().double(), inside.max(), square_1XYZ.mean()])
    return {name: values.cpu() for name, values in found.items()}


def _summary(rows: list[Scores]) -> dict[str, Any]:
    """Combine the scores of a domain's snapshots."""
    all_N = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    means = ("velocity_vrmse", "pressure_vrmse", "velocity_nrmse", "velocity_mse", "pressure_mse")
    total, count, peak, square = all_N["solid"].unbind(1)
    speed, solid = float(square.mean().sqrt()), None
    if count.sum() > 0:
        values = float((total.sum() / count.sum()).sqrt()), float(peak.max().sqrt())
        # A flow at rest has no reference speed, and no speed in its solids.
        relative = [value / speed if speed > 0 else 0.0 for value in values]
        solid = {"rms_relative": relative[0], "max_relative": relative[1], "max": values[1]}
    return {
        **{name: float(all_N[name].mean()) for name in means},
        "band_errors": {name: all_N[f"{name}_bands"].mean(0).tolist() for name in ("velocity", "pressure")},
        "seams": {
            name: {what: _ratios(all_N[f"{name}_{what}"]) for what in ("jumps", "power")}
            for name in ("velocity", "pressure")
        },
        "divergence": {
            operator: {dtype: pooled_divergence(all_N[f"{operator}/{dtype}"], spacing=1.0) for dtype in DTYPES}
            for operator in OPERATORS
        },
        "solid_velocity": solid or dict.fromkeys(("rms_relative", "max_relative", "max")),
    }


def _ratios(pairs_N23: Tensor) -> dict[str, float]:
    """Ratio of the two means over snapshots, by axis."""
    own, others = pairs_N23.mean(0)
    return dict(zip("xyz", (own / others).tolist(), strict=True))


def _table(result: dict[str, Any]) -> str:
    """One line per domain and projection, with divergences under the conserving operator."""
    settings = result["settings"]
    own = settings["operator"]
    name = "direct" if settings["decoder"] == "direct" else f"{settings['walls']}/{own}"
    sources = [(name, own, result["domains"])]
    sources += [
        (f"direct, then {name}", name.split("/")[1], found) for name, found in result.get("projected", {}).items()
    ]
    head = (
        f"{'domain':<16} {'decoder':<26} {'VRMSE of u':>10} {'of p':>8} {'bands of u: low, middle, high':>30} "
        f"{'steps, xyz':>15} {'h div/u f32':>11} {'f64':>8} {'u in solid':>10} {'ms':>12}"
    )
    lines = [head]
    for domain in result["domains"]:
        for title, operator, found in sources:
            s = found[domain]
            bands = " ".join(f"{_number(band):>9}" for band in s["band_errors"]["velocity"])
            steps = " ".join(_number(step, ".2f") for step in s["seams"]["velocity"]["jumps"].values())
            single, exact = (_number(s["divergence"][operator][dtype]["rms_relative"], ".1e") for dtype in DTYPES)
            lines.append(
                f"{domain:<16} {title:<26} {_number(s['velocity_vrmse']):>10} {_number(s['pressure_vrmse']):>8} "
                f"{bands:>30} {steps:>15} {single:>11} {exact:>8} "
                f"{_number(s['solid_velocity']['max_relative'], '.1e'):>10} "
                f"{' + '.join(_number(ms, '.3g') for ms in s['ms_per_sample'].values()):>12}"
            )
    return "\n".join(lines)


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else "0" if value == 0 else format(value, form)
