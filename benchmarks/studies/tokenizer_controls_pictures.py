"""Figures of the tokenizer controls: slices, errors over divergence, spectra of the velocity error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from shodh_moe.base.files import atomic_file
from shodh_moe.data import list_trajectories
from shodh_moe.data.loader import Snapshots
from shodh_moe.kernels import divergence
from shodh_moe.kernels.differentiation import OPERATORS
from shodh_moe.metrics.fields import energy_spectrum
from shodh_moe.report.run.fields import cut_name, mid_slice
from shodh_moe.report.style import LABEL, TICK, label, panels, png, words
from shodh_moe.tokenizer import Tokenizer, load_tokenizer
from studies.tokenizer_controls_summary import ONE_SEED, Rows, operator_of, title_of

Array = NDArray[np.float64]
SLICED = ("direct", "soft-1", "spectral", "exact-central2", "exact-staggered")
ROUNDING = 1e-18  # plotted for a smaller or zero divergence
COLOURS = {
    "direct": "#111827",
    "direct, soft penalty": "#db2777",
    "direct + Leray": "#7c3aed",
    "direct + Leray, walls exact": "#2563eb",
    "Helmholtz": "#b45309",
    "Helmholtz, walls exact": "#0f766e",
    "Helmholtz, walls ramp": "#84cc16",
}
MARKERS = {"spectral": "*", "central2": "s", "central4": "D", "staggered": "o"}


def family_of(row: str) -> str:
    """Key of a row in `COLOURS`: its title without operator and weight."""
    parts = title_of(row).split(", ")
    return ", ".join(
        "soft penalty" if part.startswith("soft penalty") else part for part in parts if part not in OPERATORS
    )


class Example:
    """The middle snapshot of each test trajectory of one domain, [B, 5, X, Y, Z] float32."""

    def __init__(self, dataset: Path, domain: str, grid: Sequence[int]):
        records = [r for r in list_trajectories(dataset, "test", list(grid)) if r.domain == domain]
        snapshots = Snapshots(records)
        ends = np.cumsum([record.n_snapshots for record in records])
        middle = [int(end) - 1 - record.n_snapshots // 2 for end, record in zip(ends, records, strict=True)]
        self.domain, self.fields_B5XYZ = domain, snapshots.batch(middle)


@torch.no_grad()
def decode_one(tokenizer: Tokenizer, fields_B5XYZ: torch.Tensor) -> tuple[Array, Array]:
    """Error, and divergence by the tokenizer's own operator, of the first snapshot, over rms(u), in float64.

    Returns:
        error_XYZ: |decoded - true velocity| / rms(u), at the voxels' centres.
        div_XYZ: h |div| / rms(u), h = 1 cell.
    """
    fields = fields_B5XYZ[:1]
    flow = tokenizer.decode(tokenizer.encode(fields), fields[:, 4:], torch.float64)
    true = fields[:, :3].double()
    rms = true.square().sum(1).mean().sqrt()
    error = (flow.velocity_B3XYZ - true).square().sum(1).sqrt() / rms
    div = divergence(flow.conserved_B3XYZ, tokenizer.config.operator).abs() / rms
    return error[0].numpy(), div[0].numpy()


@torch.no_grad()
def error_spectrum(tokenizer: Tokenizer, fields_B5XYZ: torch.Tensor) -> tuple[Array, Array]:
    """Wave numbers, and per shell the power of the velocity error over that of the truth, averaged over snapshots."""
    errors, trues = [], []
    for fields in fields_B5XYZ.split(1):
        flow = tokenizer.decode(tokenizer.encode(fields), fields[:, 4:])
        k, error = energy_spectrum(flow.velocity_B3XYZ.double() - fields[:, :3])
        errors.append(error[0])
        trues.append(energy_spectrum(fields[:, :3])[1][0])
    error, true = torch.stack(errors).sum(0), torch.stack(trues).sum(0)
    shown = k <= np.pi  # higher shells are incomplete: corners of the wave-number cube
    return k[shown].numpy(), (error / true.clamp(min=1e-30))[shown].numpy()


def draw_pictures(folder: Path, rows: Rows, tokenizers: Mapping[str, Path], dataset: Path, grid: Sequence[int]) -> None:
    """Write errors.png, spectra.png and slices_<domain>.png.

    Args:
        tokenizers: folders by variant, all of one seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    domains = sorted({domain for seeds in rows.values() for here in seeds.values() for domain in here})
    _write(folder / "errors.png", errors_against_divergence(rows, domains))
    examples = [Example(dataset, domain, grid) for domain in domains]
    spectra: dict[str, dict[str, tuple[Array, Array]]] = {domain: {} for domain in domains}
    slices: dict[str, dict[str, tuple[Array, Array]]] = {domain: {} for domain in domains}
    for variant, path in tokenizers.items():
        tokenizer = load_tokenizer(path)
        for example in examples:
            spectra[example.domain][variant] = error_spectrum(tokenizer, example.fields_B5XYZ)
            if variant in SLICED:
                slices[example.domain][variant] = decode_one(tokenizer, example.fields_B5XYZ)
    _write(folder / "spectra.png", error_spectra(spectra))
    for example in examples:
        if slices[example.domain]:
            _write(folder / f"slices_{example.domain}.png", slice_figure(example, slices[example.domain]))


def errors_against_divergence(rows: Rows, domains: Sequence[str]) -> Figure:
    """Draw one panel per domain and one point per row and seed. `ONE_SEED`, far above all others, is left out."""
    rows = {row: seeds for row, seeds in rows.items() if row not in ONE_SEED}
    figure, grid = panels(len(domains), 2, 4.6)
    for axes, domain in zip(grid, domains, strict=True):
        for row, seeds in rows.items():
            operator = operator_of(row)
            x = [max(here[domain][f"div_{operator}_float64"], ROUNDING) for here in seeds.values()]
            y = [here[domain]["velocity_vrmse"] for here in seeds.values()]
            axes.plot(x, y, MARKERS[operator], color=COLOURS[family_of(row)], markersize=5, alpha=0.8)
        axes.set_xscale("log")
        label(axes, words(domain), "h rms(div u) / rms(u), own operator, float64", "velocity VRMSE")
    families = dict.fromkeys(family_of(row) for row in rows)
    lines = [Line2D([], [], color=COLOURS[name], marker="o", linestyle="", label=name) for name in families]
    lines += [Line2D([], [], color="0.4", marker=m, linestyle="", label=name) for name, m in MARKERS.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=4, fontsize=TICK)
    return figure


def error_spectra(spectra: Mapping[str, Mapping[str, tuple[Array, Array]]]) -> Figure:
    """Draw one panel per domain and one line per variant."""
    figure, grid = panels(len(spectra), 2, 5.2)
    for axes, (domain, lines) in zip(grid, spectra.items(), strict=True):
        for number, (variant, (k, error)) in enumerate(lines.items()):
            colour = COLOURS[family_of(variant)]
            before = sum(family_of(other) == family_of(variant) for other in list(lines)[:number])
            style = ("-", "--", ":", "-.")[before % 4]
            axes.plot(k, error, color=colour, linestyle=style, linewidth=1.4, label=title_of(variant))
        axes.set_yscale("log")
        axes.axhline(1.0, color="0.6", linewidth=1.0)
        label(axes, words(domain), "wave number k (radians / cell)", "power of the velocity error / of the flow")
    handles, names = grid[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=TICK)
    return figure


def slice_figure(example: Example, found: Mapping[str, tuple[Array, Array]]) -> Figure:
    """Draw the speed of the flow, then each variant's error above its divergence, with solids outlined."""
    domain, fields = example.domain, example.fields_B5XYZ[:1]
    true = fields[:, :3].double()
    rms = true.square().sum(1).mean().sqrt()
    speed_XYZ = (true.square().sum(1).sqrt() / rms)[0].numpy()
    div_XYZ = (divergence(true, "central2").abs() / rms)[0].numpy()
    solid, across, up = mid_slice(domain, fields[0, 4].numpy())
    figure, grid = panels(2 * (len(found) + 1), len(found) + 1, 2.4, images=True)
    top, bottom = grid[: len(found) + 1], grid[len(found) + 1 :]
    highest = float(np.quantile([error for error, _ in found.values()], 0.995))
    # Divergences range from rounding to that of the data, so colours show the logarithm.
    low = np.log10(ROUNDING)

    def show(axes: Axes, volume: Array, title: str, colours: str, smallest: float, largest: float) -> object:
        picture, _, _ = mid_slice(domain, volume)
        image = axes.imshow(picture, origin="lower", cmap=colours, vmin=smallest, vmax=largest, interpolation="nearest")
        if 0 < solid.mean() < 1:
            axes.contour(solid, levels=[0.5], colors="#38bdf8", linewidths=0.7)
        axes.set_title(title, fontsize=TICK - 1)
        axes.set_xticks([])
        axes.set_yticks([])
        return image

    def decades(volume: Array) -> Array:
        return np.log10(np.maximum(volume, ROUNDING))

    speed = show(top[0], speed_XYZ, "truth: speed", "viridis", 0.0, float(speed_XYZ.max()))
    show(bottom[0], decades(div_XYZ), "truth: div, central2", "magma", low, 0.0)
    error_image = div_image = speed
    for upper, lower, (variant, (error, div)) in zip(top[1:], bottom[1:], found.items(), strict=True):
        error_image = show(upper, error, title_of(variant).replace(", walls", ",\nwalls"), "inferno", 0.0, highest)
        div_image = show(lower, decades(div), f"div, {operator_of(variant)}", "magma", low, 0.0)
    for image, axes, name in (
        (error_image, top, "|error of u| / rms(u)"),
        (div_image, bottom, "log10 h |div u| / rms(u)"),
    ):
        bar = figure.colorbar(image, ax=axes, fraction=0.025, pad=0.01)
        bar.set_label(name, fontsize=TICK)
        bar.ax.tick_params(labelsize=TICK - 1)
    top[0].set_ylabel(f"{up}", fontsize=LABEL)
    bottom[0].set_ylabel(f"{up}", fontsize=LABEL)
    bottom[0].set_xlabel(across, fontsize=LABEL)
    figure.suptitle(f"{words(domain)}: {cut_name(domain)}, a test snapshot", fontsize=LABEL)
    return figure


def _write(path: Path, figure: Figure) -> None:
    with atomic_file(path) as temporary:
        temporary.write_bytes(png(figure))
    print(f"picture: {path}", flush=True)
