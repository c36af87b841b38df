"""The benchmark in three dimensions from data to tables, at a size that shows nothing; and refused configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from shodh_moe.audit.outcome import last_checkpoint
from shodh_moe.base.errors import UserError
from shodh_moe.ccm.bench3d.config import Bench3dConfig
from shodh_moe.ccm.bench3d.measure import checkpoints, composed, measure, result_path
from shodh_moe.ccm.bench3d.run import run
from shodh_moe.ccm.bench3d.tables import ROWS, markdown, summarise
from shodh_moe.cli import main as shodh
from shodh_moe.config.load import load_config_of
from shodh_moe.inference.loading import find_source, load_source, read_weights
from shodh_moe.launching import jobs
from shodh_moe.merging import merge
from tests.tiny import CONFIG, FLOW, refused

EXAMPLE = Path(__file__).resolve().parents[3] / "configs" / "ccm" / "latent.yaml"
AXIS = {"parameter": "viscosity", "low": 0.01, "high": 0.04, "log": True, "validation": [0.009], "test": [0.0085]}


def tree(folder: Path, **changes: Any) -> dict[str, Any]:
    base = {
        "data": {
            **CONFIG["data"],
            "root": str(folder / "data"),
            "domains": {"open_channel": FLOW, "porous_media": {**FLOW, "grain": 3.0, "viscosity": 0.02}},
        },
        "tokenizer": {**CONFIG["tokenizer"], "root": str(folder / "tokenizers")},
        "model": {
            "dim": 24,
            "depth": 1,
            "heads": 2,
            "moe": {"expert_hidden": 16, "scope": "path", "attention": "own", "dropless": True},
        },
        "training": {"steps": 2, "batch_size": 4, "warmup_steps": 1, "checkpoint_every": 2, "log_every": 1},
        "parallel": {"processes": 1},
    }
    tuning = {"steps": 2, "batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 0}
    found = {"name": "trial", "runs": str(folder / "runs"), "seeds": [3], "base": base, "tuning": tuning}
    return {**found, "axes": {"porous_media": AXIS}, "trajectories": 1, "frames": 3, **changes}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.distributed
def test_experts_move_one_path_and_the_other_domain_keeps_its_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trial.yaml"
    path.write_text(yaml.safe_dump(tree(tmp_path)))
    assert shodh(["bench", "ccm3d", "--config", str(path), "--output", str(tmp_path / "docs")]) == 0
    assert "## Porous media" in capfd.readouterr().out
    bench = load_config_of(Bench3dConfig, path)
    result = json.loads(result_path(bench, "porous_media", 3).read_text())
    assert set(result["regimes"][0]["rows"]) == set(ROWS)
    windows = CONFIG["data"]["snapshots"] - 2
    assert result["others"] == {"open_channel": {"predictions": windows, "identical": windows}}
    summary = json.loads((tmp_path / "docs" / "summary.json").read_text())
    assert summary["domains"]["porous_media"]["others"]["open_channel"]["identical"] == windows
    assert "Bit for bit as before the merge: 3 of 3 predictions of open channel." in markdown(summary)

    # The merged weights are those of `shodh merge`, and differ from the mixture's only on the domain's path.
    found = checkpoints(bench, "porous_media", 3)
    config = {
        "merge_method": "ccm",
        "base_model": str(found["mixture"]),
        "models": [{"model": str(found[role]), "parameters": {"coordinate": AXIS[role]}} for role in ("low", "high")],
        "parameters": {"coordinate": 0.0085, "power": 0},
    }
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(config))
    merged = read_weights(find_source(merge(tmp_path / "merge.yaml", tmp_path / "merged")[0]))
    weights = {role: read_weights(find_source(one)) for role, one in found.items()}
    expected = composed(weights["low"], weights["high"], bench.axes["porous_media"].alpha(0.0085))
    assert all(torch.equal(values, merged[name]) for name, values in expected.items())
    own, moved = result["path"], 0
    for name, values in weights["mixture"].items():
        if not torch.equal(values, merged[name]):
            assert name.endswith(("_EIO", "_LDF", "_LFD"))
            assert all(torch.equal(values[e], merged[name][e]) for e in range(len(values)) if e != own)
            moved += 1
    assert moved > 3

    monkeypatch.setattr(jobs, "_run", lambda *arguments: pytest.fail("a process was started"))
    run(bench)

    # An expert that has changed a shared weight is refused.
    model = load_source(find_source(found["mixture"]))
    from shodh_moe.ccm.bench3d.measure import _own_path

    spoilt = {**weights, "low": {**weights["low"], "embed.weight": weights["low"]["embed.weight"] + 1}}
    with pytest.raises(UserError, match=r"porous_media-low-3/.* in embed\.weight, which all paths share"):
        _own_path(model.transformer, spoilt, found)
    both = {**weights, "low": {name: values + (values.dim() == 3) for name, values in weights["low"].items()}}
    with pytest.raises(UserError, match="on 2 paths, not on one: the router sends"):
        _own_path(model.transformer, {**both, "high": weights["high"]}, found)
    (last_checkpoint(bench.expert("porous_media", "low", 3)) / "state.json").unlink()
    with pytest.raises(UserError, match="porous_media-low-3"):
        measure(bench, "porous_media", 3)


def row(error: float, **more: Any) -> dict[str, Any]:
    persistence = {"latent_mse_persistence": 2.0, "physical_mse_persistence": 3.0}
    return {"errors": {"latent_mse": error, "physical_mse": 2 * error, **persistence}, **more}


def result(seed: int, error: float) -> dict[str, Any]:
    rows = {name: row(1.0) for name in ROWS} | {"ccm_coordinate": row(error, alpha=-1.5), "continued": row(0.8)}
    return {
        "domain": "porous_media",
        "seed": seed,
        "parameter": "viscosity",
        "middle": 0.02,
        "ends": [0.01, 0.04],
        "gamma": 1.0,
        "own_path": {"0.007": 1.0},
        "others": {"open_channel": {"predictions": 10, "identical": 10 - seed}},
        "regimes": [{"value": 0.007, "coordinate": -1.5, "rows": rows}],
    }


def test_changes_are_relative_to_the_same_seed() -> None:
    summary = summarise([result(1, 0.6), result(0, 0.4)])
    found = summary["domains"]["porous_media"]
    change = found["ood_change"]["ccm_coordinate"]["latent_mse"]
    assert change["mixture"] == pytest.approx([-0.5, -0.6, -0.4])
    assert change["continued"] == pytest.approx([-0.375, -0.5, -0.25])
    assert found["regimes"][0]["rows"]["ccm_coordinate"]["physical_mse"] == pytest.approx(1.0)
    text = markdown({**summary, "cpu_seconds": 120.0})
    assert "| CCM, coordinate | -50.0 % [-60.0, -40.0] | -37.5 % [-50.0, -25.0] |" in text
    assert "| persistence | 2, 3 |" in text
    assert "19 of 20 predictions of open channel" in text


@pytest.mark.parametrize(
    ("axis", "changes", "words"),
    [
        ({"low": 0.05}, {}, "give 0 < low < high"),
        ({"test": [0.02]}, {}, "test 0.02 is between low and high"),
        ({"test": [0.001]}, {}, "beyond CCM's reach of 1.5"),
        ({"validation": []}, {}, "need one or more different values"),
        ({"parameter": "geometry"}, {}, "parameter geometry is no number of the domain porous_media"),
        ({"parameter": "nothing"}, {}, "parameter nothing is no number"),
        ({"low": 0.021, "test": [0.045]}, {}, "trained at viscosity 0.02, which is not between 0.021 and 0.04"),
        ({}, {"axes": {"obstacle_wake": AXIS}}, "axes.obstacle_wake: base.data.domains has only"),
        ({}, {"frames": 4}, "frames 4 must be more than base.model.history 2"),
        ({}, {"seeds": [1, 1]}, "one or more different seeds"),
        ({"lower": 1}, {}, "unknown key"),
    ],
)
def test_configs_that_make_no_sense_are_refused(
    axis: dict[str, Any],
    changes: dict[str, Any],
    words: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(yaml.safe_dump(tree(tmp_path, **{"axes": {"porous_media": {**AXIS, **axis}}, **changes})))
    refused(capfd, "bench", "ccm3d", "--config", str(path), says=(words,))
    assert [one.name for one in tmp_path.iterdir()] == ["odd.yaml"]


def test_a_mixture_without_paths_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    odd = tree(tmp_path)
    odd["base"]["model"]["moe"] |= {"scope": "layer", "attention": "shared"}
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(odd))
    refused(capfd, "bench", "ccm3d", "--config", str(tmp_path / "odd.yaml"), says=("needs scope path",))


def test_the_example_tests_outside_of_the_ranges() -> None:
    bench = load_config_of(Bench3dConfig, EXAMPLE)
    for axis in bench.axes.values():
        places = [axis.alpha(value) for value in axis.test]
        assert [round(abs(place), 1) for place in places] == [1.5, 1.5]
        assert places[0] < 0 < places[1]
    expert = bench.expert("open_channel", "high", 1)
    assert expert.start == "runs/ccm3d/runs/mixture-1"
    assert expert.finetune is not None
    assert expert.finetune.train == "paths"
    assert [name for name, _ in expert.data.domains.items()] == ["open_channel"]
    held_out = bench.held_out("open_channel", 0.27).data
    assert held_out.domains.open_channel.roughness == 0.27
    assert held_out.seed != expert.data.seed
