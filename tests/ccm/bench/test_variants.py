"""Variants of the benchmark: the experts that each needs, what it measures, and refused combinations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from shodh_moe.base.errors import UserError
from shodh_moe.ccm.bench import vary as module
from shodh_moe.ccm.bench.config import BenchConfig, checkpoint_of_last_step
from shodh_moe.ccm.bench.run import _datasets, _experts
from shodh_moe.ccm.bench.tables import _variants
from shodh_moe.ccm.bench.vary import summarise_variants, unmeasured, variant_path, vary
from shodh_moe.ccm.expert import Expert, compose
from shodh_moe.ccm.family import SPLITS
from shodh_moe.cli import main as shodh
from shodh_moe.config.load import load_config_of
from shodh_moe.report import page
from tests.ccm.bench.experts import KEY, bench, write_experts, write_truth
from tests.ccm.synthetic import CHANNELS, GRID, SNAPSHOTS, save_expert

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "ccm"


def found(config: BenchConfig, name: str) -> dict[str, Any]:
    return dict(json.loads(variant_path(config, KEY, 0, name).read_text()))


def mean(result: dict[str, Any], row: str) -> float:
    errors = [error for regime in result["regimes"] for error in regime["rows"][row]["errors"]]
    return sum(errors) / len(errors)


def test_each_variant_is_measured_once_and_the_true_line_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = {
        "only-spectral": {"layers": ["spectral"]},
        "random": {"direction": "random"},
        "shared": {"direction": "none"},
        "twins": {"direction": "twins"},
        "frames-2": {"frames": 2},
        "frames-5": {"frames": 5},
        "noise": {"noise": 0.5},
        "bow": {"curve": "anchor", "bow": "validation"},
        "groups": {"groups": True},
        "jacobian": {"curve": "jacobian", "bow": "validation"},
        "outputs": {"curve": "outputs"},
        "oracle": {"oracle": True},
        "slow": {"steps": 1},
    }
    config = bench(tmp_path, variants)
    made = write_experts(config)
    write_truth(config, made[f"{KEY}-0-low"], made[f"{KEY}-0-high"])
    assert unmeasured(config, KEY, 0) == ["unchanged", *variants]
    vary(config, KEY, 0)
    assert unmeasured(config, KEY, 0) == []
    results = {name: found(config, name) for name in ("unchanged", *variants)}
    unchanged = results["unchanged"]
    assert mean(unchanged, "ccm_coordinate") < 1e-5 < 1e-2 < mean(unchanged, "anchor")
    for name in ("only-spectral", "random", "shared", "twins", "slow"):
        assert mean(results[name], "ccm_coordinate") > 1e-2, name
        assert mean(results[name], "anchor") == pytest.approx(mean(unchanged, "anchor")), name
    for name in ("random", "twins"):
        assert results[name]["distance"] == pytest.approx(unchanged["distance"], rel=1e-3)
    assert results["shared"]["distance"] == 0.0
    # The data lie on the straight line, which is the share 0 of the parabola.
    assert results["bow"]["chosen"]["bow"] == 0.0
    assert [results[name]["frames"] for name in ("unchanged", "frames-2", "frames-5")] == [3, 5, 5]
    assert results["jacobian"]["chosen"]["bow"] == 0.0
    for name, result in results.items():
        paths = ("unchanged", "bow", "groups", "jacobian", "outputs", "oracle")
        assert ("validation_error" in result["chosen"]) == (name in paths)
    assert results["unchanged"]["chosen"]["validation_error"]["ccm_coordinate"] < 1e-5
    assert mean(results["outputs"], "ccm_coordinate") > 1e-3
    assert mean(results["noise"], "ccm_prefix") > 10 * mean(unchanged, "ccm_prefix")
    assert set(results["groups"]["regimes"][0]["rows"]["ccm_prefix"]["alphas"]) == {"input", "blocks", "output"}
    assert "oracle" not in results["random"]["regimes"][0]["rows"]
    assert mean(results["oracle"], "oracle") <= mean(results["oracle"], "ccm_coordinate") + 1e-7

    monkeypatch.setattr(module, "_measure", lambda *arguments: pytest.fail("it was measured again"))
    vary(config, KEY, 0)
    summary = summarise_variants(config)[KEY]
    assert list(summary) == ["unchanged", *variants]
    assert list(summary["unchanged"]["validation"]) == ["ccm_coordinate", "ccm_prefix"]
    assert summary["random"]["validation"] == {}
    assert summary["unchanged"]["rows"]["ccm_coordinate"]["reduction"]["anchor"]["value"] > 0.99
    text = page.markdown([page.Section("Variants", list(_variants({"variants": {KEY: summary}})))])
    assert "| variant | distance | CCM, coordinate | reduction |" in text
    assert all(f"| {name} |" in text for name in summary)


def test_a_curve_finds_data_on_it_and_ends_may_lie_elsewhere(tmp_path: Path) -> None:
    from shodh_moe.ccm.curve import quadratic

    config = bench(tmp_path, {"curve": {"curve": "middle", "bow": "validation"}, "nearer": {"ends": 0.5}})
    made = write_experts(config)
    low, middle, high = (made[f"{KEY}-0-{role}"] for role in ("low", "middle", "high"))
    write_truth(config, low, high, quadratic(low, middle, high))
    vary(config, KEY, 0)
    assert found(config, "curve")["chosen"]["bow"] == 1.0
    assert mean(found(config, "curve"), "ccm_coordinate") < 1e-5 < mean(found(config, "unchanged"), "ccm_coordinate")
    # Experts at s = -0.5 and 0.5: on their line, the expert of s = 0.5 is at alpha = 0.5.
    near, far = made[f"{KEY}-0-low-ends0.5"], made[f"{KEY}-0-high-ends0.5"]
    nearer = config.families[KEY].variants["nearer"]
    one, other = module.ends_of(nearer, {"low": _on_disk(near), "high": _on_disk(far)}, 0)
    for name, values in compose(one, other, 0.5).weights().items():
        torch.testing.assert_close(values, far.weights()[name], atol=1e-5, rtol=1e-4)


def _on_disk(expert: Expert) -> Expert:
    return Expert(checkpoint_of_last_step(expert.config), expert.config, expert.scale, expert.network)


def test_an_expert_of_another_anchor_is_refused(tmp_path: Path) -> None:
    config = bench(tmp_path, {"curve": {"curve": "anchor"}})
    made = write_experts(config)
    write_truth(config, made[f"{KEY}-0-low"], made[f"{KEY}-0-high"])
    low = made[f"{KEY}-0-low"]
    start = {"path": "elsewhere", "step": 2, "sha256": "0" * 64}
    path = checkpoint_of_last_step(low.config)
    save_expert(path.with_name("9"), low.config, low.network, low.scale, CHANNELS, start=start)
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    path.with_name("9").rename(path)
    with pytest.raises(UserError, match=r"-high/checkpoints/2 was not fine-tuned from the anchor of .*-low/"):
        vary(config, KEY, 0)


def test_experts_are_trained_only_where_a_variant_needs_others(tmp_path: Path) -> None:
    other = {"name": KEY, "root": str(tmp_path / "data"), "grid": GRID, "snapshots": SNAPSHOTS, "seed": 9}
    variants = {
        "steps": {"steps": 7},
        "both": {"steps": 7, "learning_rate": 1e-3},
        "ends": {"ends": 0.5},
        "support": {"support": [-1, 1]},
        "other": {"anchor": other},
        "curve": {"curve": "middle"},
        "bow": {"curve": "middle", "bow": "validation"},
        "noise": {"noise": 0.1},
    }
    config = bench(tmp_path, variants)
    found = _experts(config)
    extra = {name.removeprefix(f"{KEY}-0-"): one for name, one in found.items()}
    on = next(name for name in extra if name.startswith("anchor-on-")).removeprefix("anchor")
    tags = ("", "-steps7", "-steps7-rate0.001", "-ends0.5", "-support-1+1", on)
    assert set(extra) == {
        *("anchor", "conditioned", "middle", "anchor-support-1+1", f"anchor{on}"),
        *(f"{end}{tag}" for end in ("low", "high") for tag in tags),
    }
    assert extra["low-steps7-rate0.001"].training.steps == 7
    training = extra["low"].training
    ratio = training.min_learning_rate / training.learning_rate
    assert extra["low-steps7-rate0.001"].training.min_learning_rate == pytest.approx(1e-3 * ratio)
    assert extra["low-ends0.5"].family.family().coordinates["endpoint_low"] == (-0.5,)
    assert extra["low-ends0.5"].family.family().coordinates["ood_low"] == ()
    assert extra["anchor-support-1+1"].family.family().coordinates["support"] == (-1.0, 1.0)
    assert extra["low-support-1+1"].start == str(tmp_path / "bench" / "experts" / f"{KEY}-0-anchor-support-1+1")
    assert extra["low-support-1+1"].family == extra["low"].family
    assert extra["middle"].family.family().coordinates["support"] == (0.0,)
    assert (extra["middle"].start, extra["middle"].splits) == (extra["low"].start, ["support"])
    assert extra[f"anchor{on}"].family.seed == 9
    assert len(_datasets(config)) == 5


@pytest.mark.parametrize(
    ("variant", "changes", "words"),
    [
        ({"layers": ["lift"], "direction": "random"}, {}, "layers and direction exclude each other"),
        ({"layers": ["hidden"]}, {}, "should be 'lift', 'spectral', 'pointwise' or 'projection'"),
        ({"layers": []}, {}, "layers [] must be one or more different values"),
        ({"groups": True, "curve": "anchor"}, {}, "groups needs the line between the experts: leave out curve"),
        ({"curve": "anchor", "ends": 0.5}, {}, "leave out ends"),
        ({"curve": "anchor", "support": [0.0]}, {}, "leave out support and anchor"),
        ({"curve": "anchor_jacobian", "support": [0.0]}, {}, "curve: anchor_jacobian uses the family's own anchor"),
        ({"bow": "validation"}, {}, "bow is for a parabola"),
        ({"curve": "outputs", "bow": "validation"}, {}, "add curve, other than outputs"),
        ({"support": [0.0, 0.0]}, {}, "support [0.0, 0.0] must be one or more different values"),
        ({"frames": 1}, {}, "variants.odd.frames 1 must be more than network.history 1"),
        ({"frames": SNAPSHOTS}, {}, "less than family.snapshots 7"),
        ({"anchor": {"name": "navier_stokes"}}, {}, "variants.odd.anchor has 1 channels, but reaction_diffusion has 2"),
        ({"ends": -1.0}, {}, "should be greater than 0"),
        ({"frame": 3}, {}, "unknown key"),
        ({"frames": 3}, {"coordinates": {"ood_low": [], "ood_high": []}}, "of which the family has no regimes"),
    ],
)
def test_variants_that_make_no_sense_are_refused(
    variant: dict[str, Any], changes: dict[str, Any], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tree = bench(tmp_path, {}).model_dump()
    tree["families"][KEY]["family"] |= changes
    tree["families"][KEY]["variants"] = {"odd": variant}
    path = tmp_path / "odd.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert shodh(["bench", "ccm", "--config", str(path)]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_the_ablations_use_the_experts_of_the_benchmark() -> None:
    main, ablations = (load_config_of(BenchConfig, CONFIGS / f"{name}.yaml") for name in ("bench", "ablations"))
    assert ablations.folder == main.folder
    for key, family in main.families.items():  # what both measure has one result
        paths = {name: ablations.families[key].variants[name] for name in family.variants}
        assert paths == family.variants
        assert {one.curve for one in paths.values()} >= {"anchor", "middle", "jacobian", "anchor_jacobian", "outputs"}
        assert any(one.groups for one in paths.values())
        assert all(one.is_path for one in paths.values())
    own = {one.name: one for one in _experts(main).values()}
    assert {name: one for name, one in _experts(ablations).items() if name in own} == own


def test_the_backbones_are_four_networks_on_the_data_of_three_families() -> None:
    from shodh_moe.ccm.bench.run import backbones

    for name, labels in (
        ("backbones", ["FNO 24/6", "FNO 32/8", "FNO 40/10", "DPOT tiny"]),
        ("backbones_gpu", ["FNO 48/12", "FNO 64/16", "FNO 80/20", "DPOT large"]),
    ):
        config = load_config_of(BenchConfig, CONFIGS / f"{name}.yaml")
        found = backbones(config)
        assert list(found) == ["reaction_diffusion", "navier_stokes", "shallow_water"]
        assert all(list(networks) == labels for networks in found.values())
        assert len(_datasets(config)) == 3
        assert {SPLITS[0]} <= {split for one in config.families.values() for split in one.family.trajectories}
