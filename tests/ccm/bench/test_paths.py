"""Paths are chosen on validation regimes, and the aims of curved paths follow from their test errors."""

from __future__ import annotations

import math
from typing import Any

import pytest

from shodh_moe.base.files import finite_json
from shodh_moe.ccm.bench.paths import COORDINATE, GAP, ORACLE, compare_paths
from shodh_moe.ccm.bench.tables import _paths
from shodh_moe.report import page

PATHS = {"unchanged": None, "curve": "anchor", "jacobian": "jacobian", "outputs": "outputs"}


def variant(ood: float | None, validation: float, oracle: float | None = None) -> dict[str, Any]:
    errors = {"ccm_coordinate": ood, "ccm_prefix": ood, "anchor": 1.0, **({"oracle": oracle} if oracle else {})}
    rows = {row: {"ood": {"value": value}} for row, value in errors.items()}
    regimes = [{"split": split, "errors": errors} for split in ("ood_low", "ood_high")]
    return {"rows": rows, "regimes": regimes, "validation": dict.fromkeys(("ccm_coordinate", "ccm_prefix"), validation)}


def found(**variants: dict[str, Any]) -> dict[str, Any]:
    family = {"name": "shallow_water", "rows": {"conditioned": {"ood": {"value": 0.4}}}}
    paths = {name: PATHS[name] for name in variants}
    return compare_paths("shallow_water", family, variants, paths)


def test_the_path_is_chosen_on_validation_and_two_networks_take_no_part() -> None:
    made = found(
        unchanged=variant(0.8, 0.5, oracle=0.7),
        curve=variant(0.1, 0.6),
        jacobian=variant(0.6, 0.4),
        outputs=variant(0.5, 0.1),
    )
    chosen = [(row["readout"], row["path"]) for row in made["rows"] if row["chosen"]]
    assert chosen == [("ccm_coordinate", "jacobian"), ("ccm_prefix", "jacobian")]
    aims = {(one["readout"], one["aim"]): (one["value"], one["held"]) for one in made["aims"]}
    assert aims == {
        ("ccm_coordinate", ORACLE): (pytest.approx(0.6 / 0.7), True),
        ("ccm_coordinate", GAP): (pytest.approx(0.5), aims["ccm_coordinate", GAP][0] >= 0.5),
        ("ccm_coordinate", COORDINATE): (pytest.approx(0.4), True),
        ("ccm_prefix", ORACLE): (pytest.approx(0.6 / 0.7), True),
        ("ccm_prefix", GAP): (pytest.approx(0.5), aims["ccm_prefix", GAP][0] >= 0.5),
    }
    text = page.markdown([page.Section("Paths", list(_paths({"paths": {"shallow_water": finite_json(made)}})))])
    assert "| jacobian (chosen) | CCM, coordinate | 0.400 | 0.600 | 40.0 % | 85.7 % | 50.0 % |" in text
    assert "CCM, coordinate on jacobian | <= 105.0 % | met: 85.7 % |" in text


def test_missing_numbers_are_no_success() -> None:
    blown = found(unchanged=variant(0.8, 0.5), jacobian=variant(None, math.inf))
    assert [row["path"] for row in blown["rows"] if row["chosen"]] == ["unchanged", "unchanged"]
    aims = {one["aim"]: one["held"] for one in blown["aims"] if one["readout"] == "ccm_coordinate"}
    assert aims == {ORACLE: False, GAP: False, COORDINATE: False}
    lines = page.markdown([page.Section("Paths", list(_paths({"paths": {"shallow_water": finite_json(blown)}})))])
    assert "| jacobian | CCM, coordinate | blew up | blew up | - | - | - |" in lines
