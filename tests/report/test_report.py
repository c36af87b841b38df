from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from shodh_moe.base.errors import UserError
from shodh_moe.report import summary_table, write_report
from shodh_moe.report.run.routing import evenly
from shodh_moe.report.run.tables import beats_baselines, divergence, divergence_norm

DOMAINS = ("open_channel", "porous_media")
LAYERS, EXPERTS = 4, 2
PICTURES = {
    "fields_open_channel",
    "fields_porous_media",
    "spectra",
    "rollout",
    "expert_load",
    "routing_map_open_channel",
    "routing_map_porous_media",
    "losses",
    "routing_over_steps",
}


def example_flow(domain: str, n: tuple[int, int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Make a field [4, X, Y, Z] (velocity, pressure) and a solid [X, Y, Z] that look like the domain."""
    x, y, z = np.meshgrid(*(np.arange(size) for size in n), indexing="ij")
    if domain == "open_channel":
        solid = z < 2 + 2 * np.sin(2 * np.pi * x / n[0]) ** 2
        speed = 0.05 * np.clip(z / n[2], 0, 1) ** 0.3
    else:
        centres = rng.uniform(0, 1, (14, 3)) * n
        solid = np.zeros(n, bool)
        for centre in centres:
            distance = [
                np.abs((axis - c + size / 2) % size - size / 2)
                for axis, c, size in zip((x, y, z), centre, n, strict=True)
            ]
            solid |= np.sqrt(sum(d**2 for d in distance)) < n[0] / 6.5
        speed = 0.03 * (1 + 0.5 * np.sin(2 * np.pi * y / n[1]))
    swirl = 0.006 * np.sin(4 * np.pi * x / n[0] + 2 * np.pi * z / n[2])
    velocity = np.stack([speed + swirl, 0.6 * swirl, 0.5 * swirl]) * ~solid
    return np.concatenate([velocity, 2e-4 * np.cos(2 * np.pi * x / n[0])[None]]), solid


def evaluation_arrays(n: tuple[int, int, int], layers: int, experts: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"domains": np.array(DOMAINS)}
    tokens = tuple(size // 8 for size in n)
    for number, domain in enumerate(DOMAINS):
        true, solid = example_flow(domain, n, rng)
        k = np.arange(n[0]) * 2 * np.pi / max(n)
        spectrum = np.where(k > 0, 1e-4 * np.maximum(k, 0.1) ** -1.7 * np.exp(-0.4 * k), 1e-3)
        time = np.arange(1, 11)
        solid_tokens = solid.reshape(tokens[0], 8, tokens[1], 8, tokens[2], 8).mean((1, 3, 5))
        expert_map = np.full((layers, *tokens), number % experts)
        expert_map[0] = np.where(solid_tokens > 0.3, 1, 0) if experts < 3 else rng.integers(0, experts, tokens)
        arrays |= {
            f"{domain}/true": true,
            f"{domain}/pred": true + 0.05 * true.std((1, 2, 3), keepdims=True) * rng.standard_normal(true.shape),
            f"{domain}/solid": solid,
            f"{domain}/spectrum_k": k,
            f"{domain}/spectrum_true": spectrum,
            f"{domain}/spectrum_reconstruction": spectrum * np.exp(-0.5 * k),
            f"{domain}/spectrum_pred": spectrum * np.exp(-0.9 * k),
            f"{domain}/rollout_time": time,
            f"{domain}/rollout_error": 0.1 * time**0.6,
            f"{domain}/rollout_error_low": 0.08 * time**0.6,
            f"{domain}/rollout_error_high": 0.13 * time**0.6,
            f"{domain}/rollout_error_persistence": 0.2 * time**0.7,
            f"{domain}/expert_map": expert_map,
            f"{domain}/solid_fraction": solid_tokens,
        }
    return {name: value if name == "domains" else np.asarray(value, np.float32) for name, value in arrays.items()}


def shares(domain: int, layer: int, progress: float, experts: int) -> list[float]:
    """Return loads that are even at ``progress`` 0 and separate the domains at 1, except in layer 0."""
    home = 0.6 if layer == 0 else 1 / experts + (1 - 1 / experts) * progress
    load = [(1 - home) / max(experts - 1, 1)] * experts
    load[domain % experts] = home
    return load


def routing_layers(progress: float, layers: int, experts: int) -> list[dict[str, Any]]:
    loads = [{d: shares(i, layer, progress, experts) for i, d in enumerate(DOMAINS)} for layer in range(layers)]
    return [
        {
            "layer": layer,
            "load": load,
            "dropped_fraction": dict.fromkeys(DOMAINS, 0.3 * (1 - progress) / (layer + 1)),
            "entropy": dict.fromkeys(DOMAINS, 0.69 * (1 - progress)),
        }
        for layer, load in enumerate(loads)
    ]


def evaluation_metrics(layers: int, experts: int) -> dict[str, Any]:
    found = routing_layers(1.0, layers, experts)
    for layer in found:
        layer["purity"] = {d: max(load) for d, load in layer["load"].items()}
        layer["bifurcated"] = layer["layer"] > 0
        layer["mutual_information"] = {"domain": 0.6931 if layer["layer"] else 0.02, "solid_fraction": 0.11}
    domain = {
        "latent_mse": 0.1234,
        "latent_mse_persistence": 0.25,
        "latent_mse_mean": 0.9,
        "physical_mse": 0.021,
        "physical_mse_persistence": 0.034,
        "physical_mse_mean": 0.5,
        "physical_mse_reconstruction": 0.011,
        "velocity_vrmse": 0.31,
        "velocity_vrmse_persistence": 0.44,
        "pressure_vrmse": 0.52,
        "velocity_nrmse": 0.17,
        "band_errors": {"velocity": [0.002, 0.13, 0.97]},
        "n_tokens": 4096,
    }
    divergence = {
        "operator": "spectral",
        "dtype": "float32",
        "norm": "h * rms(div u) / rms(u); rms over all voxels and samples, h = 1 cell",
        "rms_relative": 3.1e-7,
        "rms": 1.2e-8,
        "max": 7e-8,
    }
    return {
        "run": "quickstart",
        "step": 400,
        "world_size": 2,
        "ep_size": 2,
        "seed": 0,
        "domains": {"open_channel": domain, "porous_media": {**domain, "latent_mse": 0.3}},
        "routing": {"layers": found, "bifurcated": False},
        "divergence": {**divergence, "spacing": 1.0},
        "divergence_table": [
            {"what": "decoded prediction", **divergence},
            {
                "what": "decoded prediction",
                **divergence,
                "dtype": "float64",
                "rms_relative": 2.9e-16,
                "rms": 1e-17,
                "max": 5e-17,
            },
            {
                "what": "the simulated data, open_channel",
                **divergence,
                "operator": "central2",
                "rms_relative": 4.2e-3,
                "rms": 2e-4,
                "max": 3e-3,
            },
        ],
        "throughput": {"tokens_per_second": 12345.6, "step_ms_median": 83.2},
        "peak_memory_bytes": 512 * 2**20,
    }


def history(layers: int, experts: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for step in range(10, 401, 10):
        error = 0.1 + 0.9 * np.exp(-step / 80)
        records.append(
            {
                "kind": "train",
                "step": step,
                "loss": error + 0.013,
                "prediction_loss": error,
                "balance_loss": 0.011,
                "z_loss": 0.002,
                "learning_rate": 1e-3,
                "grad_norm": 1.0,
                "step_ms": 83.0,
                "tokens_per_second": 12000.0,
                "routing": routing_layers(1 - np.exp(-step / 60), layers, experts),
            }
        )
        if step % 100 == 0:
            valid = {"open_channel": error, "porous_media": 1.4 * error}
            records.append(
                {
                    "kind": "valid",
                    "step": step,
                    "latent_mse": valid,
                    "latent_mse_persistence": dict.fromkeys(DOMAINS, 0.25),
                }
            )
    return records


def make_run(
    folder: Path, n: tuple[int, int, int] = (32, 32, 32), layers: int = LAYERS, experts: int = EXPERTS
) -> Path:
    """Make a run folder like that of training and evaluation, with made-up numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("name: quickstart\nmodel:\n  dim: 128  # <b>&\n")
    environment = {
        "host": "laptop",
        "versions": {"python": "3.11", "torch": "2.13"},
        "devices": ["cpu"],
        "git_commit": None,
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "metrics.json").write_text(json.dumps(evaluation_metrics(layers, experts)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in history(layers, experts)))
    tokenizer: list[dict[str, Any]] = []
    for step in range(20, 401, 20):
        error = 0.05 + float(np.exp(-step / 60))
        tokenizer.append(
            {"kind": "train", "step": step, "loss": 1.6 * error, "velocity_mse": error, "pressure_mse": 0.6 * error}
        )
        if step % 100 == 0:
            both = {"open_channel": error, "porous_media": 1.3 * error}
            half = {domain: 0.5 * value for domain, value in both.items()}
            tokenizer.append({"kind": "valid", "step": step, "velocity_mse": both, "pressure_mse": half})
    (folder / "tokenizer_metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in tokenizer))
    np.savez(folder / "evaluation.npz", **evaluation_arrays(n, layers, experts))
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "quickstart")
    write_report(folder)
    return folder


def test_every_picture_is_written_and_not_blank(run_folder: Path) -> None:
    files = {path.stem: path for path in (run_folder / "report").glob("*.png")}
    assert set(files) == PICTURES
    for path in files.values():
        picture = imread(path)
        assert picture.shape[0] > 300
        assert picture.shape[1] > 1000
        assert picture[..., :3].std() > 0.02, f"{path.name} is nearly blank"
    assert {path.name for path in (run_folder / "report").iterdir()} == {f"{name}.png" for name in PICTURES} | {
        "index.html",
        "flow_3d.html",
    }


def test_the_page_needs_no_external_files(run_folder: Path) -> None:
    page = (run_folder / "report" / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(PICTURES)
    without_pictures = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"<script|<link|<iframe|@import|url\(|https?://|file:", without_pictures, re.IGNORECASE)
    links = re.findall(r'href="([^"]*)"', page)
    assert [target for target in links if not target.startswith("#")] == ["flow_3d.html"]
    assert all(source.startswith("data:image/png") for source in re.findall(r'src="([^"]{20})', page))
    assert re.search(r"[$]\w", without_pictures) is None  # every placeholder was filled


def test_the_page_shows_the_numbers_and_escapes_what_it_quotes(run_folder: Path) -> None:
    page = (run_folder / "report" / "index.html").read_text(encoding="utf-8")
    for shown in (
        "0.1234",
        "3.1e-07",
        "central2",
        "float64",
        "0.97",
        "512",
        "12,346",
        "versions.torch",
        "&lt;b&gt;&amp;",
    ):
        assert shown in page, shown
    assert str(run_folder) not in page


def test_summary_table() -> None:
    text = summary_table(evaluation_metrics(LAYERS, EXPERTS))
    lines = [line.split() for line in text.splitlines()]
    assert ["open_channel", "latent", "MSE", "0.1234", "0.25", "0.9", "-", "yes"] in lines
    assert ["porous_media", "latent", "MSE", "0.3", "0.25", "0.9", "-", "no"] in lines
    assert "routing bifurcated: no (3 of 4 layers)" in text
    assert "operator spectral, dtype float32, norm h * rms" in text
    assert summary_table({})  # an empty evaluation does not crash


def test_divergence_is_never_shown_without_its_norm() -> None:
    shared = {"divergence": {"operator": "spectral", "dtype": "float64", "norm": "rms", "rms_relative": 1e-16}}
    assert divergence_norm(shared) == "rms"
    assert "norm" not in divergence(shared).head
    mixed = {"divergence_table": [{"what": "a", "norm": "rms"}, {"what": "b", "norm": "max"}]}
    assert divergence_norm(mixed) == ""
    assert [row[3] for row in divergence(mixed).rows] == ["rms", "max"]
    assert divergence({}).rows == []


def test_beating_the_baselines_requires_both_and_no_nan() -> None:
    assert beats_baselines({"m": 1.0, "m_persistence": 2.0, "m_mean": 1.5}, "m") == "yes"
    assert beats_baselines({"m": 1.0, "m_persistence": 1.0, "m_mean": 1.5}, "m") == "no"
    assert beats_baselines({"m": float("nan"), "m_persistence": 2.0, "m_mean": 1.5}, "m") == "no"
    assert beats_baselines({"m": 1.0, "m_persistence": 2.0}, "m") == "-"


def test_many_layers_and_experts_on_a_flat_box(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "wide", n=(48, 16, 24), layers=12, experts=16)
    write_report(folder)
    assert {path.stem for path in (folder / "report").glob("*.png")} == PICTURES


@pytest.mark.parametrize("name", ["metrics.json", "metrics.jsonl", "evaluation.npz", "config.yaml", "environment.json"])
def test_a_missing_file_is_named_with_the_command_that_makes_it(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path / "run", n=(16, 16, 16))
    (folder / name).unlink()
    with pytest.raises(UserError, match=rf"{re.escape(name)} is missing: make it with `shodh (pretrain|evaluate)`"):
        write_report(folder)


@pytest.mark.parametrize("name", ["metrics.json", "evaluation.npz", "environment.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path / "run", n=(16, 16, 16))
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])
    with pytest.raises(UserError, match=re.escape(name)):
        write_report(folder)


@pytest.mark.parametrize("name", ["metrics.json", "evaluation.npz"])
def test_a_domain_that_is_no_part_of_a_file_name_is_refused(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path / "run", n=(16, 16, 16))
    outside = tmp_path / "outside.png"
    outside.write_text("kept")
    if name == "metrics.json":
        metrics = json.loads((folder / name).read_text())
        metrics["domains"]["x/../../../outside"] = metrics["domains"]["open_channel"]
        (folder / name).write_text(json.dumps(metrics))
    else:
        arrays = dict(np.load(folder / name))
        np.savez(folder / name, **{**arrays, "domains": np.array(["open_channel", "x/../../../outside"])})
    (folder / "report" / "fields_x").mkdir(parents=True)
    with pytest.raises(UserError, match=r"a domain named 'x/\.\./\.\./\.\./outside'"):
        write_report(folder)
    assert outside.read_text() == "kept"


def test_a_missing_run_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path / "nothing")


def test_missing_measurements_are_stated_in_the_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", n=(16, 16, 16))
    (folder / "report").mkdir()
    (folder / "report" / "spectra.png").write_bytes(b"of an older evaluation")
    arrays = evaluation_arrays((16, 16, 16), LAYERS, EXPERTS)
    np.savez(folder / "evaluation.npz", **{name: arrays[name] for name in ("domains", "open_channel/expert_map")})
    (folder / "metrics.json").write_text(json.dumps({"step": 1, "domains": {d: {"latent_mse": 1.0} for d in DOMAINS}}))
    lines = [{"kind": "train", "step": 1, "loss": 1.0}]
    (folder / "metrics.jsonl").write_text(json.dumps(lines[0]) + '\n{"kind": "tra')  # killed while writing
    (folder / "tokenizer_metrics.jsonl").unlink()
    page = write_report(folder).read_text(encoding="utf-8")
    for sentence in (
        "kept no example fields of porous media",
        "kept no spectra",
        "kept no rollout",
        "holds no expert loads",
        "No routing map of porous media",
        "holds no routing records",
        "divergence was not measured",
        "not measured",
    ):
        assert sentence in page, sentence
    assert {path.stem for path in (folder / "report").glob("*.png")} == {"routing_map_open_channel", "losses"}


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", n=(16, 16, 16))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[2] = lines[2][:10]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"metrics\.jsonl line 3"):
        write_report(folder)


def test_evenly() -> None:
    assert evenly(4, 9) == [0, 1, 2, 3]
    assert evenly(12, 4) == [0, 4, 7, 11]
    assert evenly(0, 4) == []
