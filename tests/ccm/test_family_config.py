"""The ``family`` section: variations of the built-in families, identities of earlier versions, refused keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from shodh_moe.base.errors import UserError
from shodh_moe.ccm import data
from shodh_moe.ccm.config import ExpertConfig
from shodh_moe.ccm.expert import expert_inputs
from shodh_moe.ccm.family import SPLITS, initial_states, settings_at
from shodh_moe.ccm.family_config import FamilyConfig
from shodh_moe.cli import main as shodh
from shodh_moe.runs.folder import claim_run_folder
from shodh_moe.solvers import trajectory_seed
from tests.ccm.tiny import config, tree


@pytest.mark.parametrize(
    ("section", "folder", "inputs"),
    [
        ({"name": "reaction_diffusion"}, "ccm-07b0f6a8", "f2abf4fc"),
        ({"name": "navier_stokes"}, "ccm-8cddc8c6", "112c444f"),
        ({"name": "shallow_water"}, "ccm-b01a38e5", "8491b723"),
        ({"name": "dam_height"}, "ccm-00911a6a", "20b68da0"),
        ({"grid": 26, "snapshots": 6, "trajectories": {"support": 3}, "seed": 4}, "ccm-15e01b84", "f222d5ce"),
    ],
)
def test_the_families_of_earlier_versions_keep_their_folders(section: dict[str, Any], folder: str, inputs: str) -> None:
    family = FamilyConfig.model_validate(section)
    assert family.folder().name == folder
    assert expert_inputs(ExpertConfig(family=family))["data"] == inputs


def test_a_run_of_an_earlier_version_resumes(tmp_path: Path) -> None:
    mine = config(tmp_path)
    stored = mine.model_dump()
    for key in set(FamilyConfig.model_fields) - {"name", "root", "grid", "snapshots", "trajectories", "seed"}:
        del stored["family"][key]
    run = Path(mine.runs) / mine.name
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(stored))
    claim_run_folder(mine)
    with pytest.raises(UserError, match=r"differs in family\.high \(None there, 0\.009 here\)"):
        claim_run_folder(config(tmp_path, family=tree(tmp_path)["family"] | {"high": 9e-3}))


def test_values_that_are_the_familys_own_are_the_same_data() -> None:
    own = {"name": "shallow_water", "parameter": "gravity", "low": 0.4, "high": 2.5, "scale": "sqrt", "interval": 0.1}
    given = FamilyConfig.model_validate(own | {"solver": {"dam_height": 2.0, "walls": "outflow"}, "grid": 48})
    assert given.folder() == FamilyConfig(name="shallow_water").folder()


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"low": 1e-3}, ("low", 1e-3)),
        ({"scale": "linear"}, ("scale", "linear")),
        ({"interval": 0.5}, ("interval", 0.5)),
        ({"coordinates": {"validation": [-1.1, 1.1]}}, ("coordinates", (-1.1, 1.1))),
    ],
)
def test_a_key_changes_the_family_and_its_folder(change: dict[str, Any], place: tuple[str, Any]) -> None:
    changed = FamilyConfig.model_validate(change)
    value = getattr(changed.family(), place[0])
    assert (value["validation"] if place[0] == "coordinates" else value) == place[1]
    assert changed.folder() != FamilyConfig().folder()


@pytest.mark.parametrize(
    ("section", "constant"),
    [
        ({"name": "reaction_diffusion", "parameter": "inhibitor_diffusivity"}, "diffusivity"),
        ({"name": "navier_stokes", "parameter": "forcing"}, "viscosity"),
    ],
)
def test_a_setting_of_the_solver_can_be_the_parameter(section: dict[str, Any], constant: str, tmp_path: Path) -> None:
    """The regimes differ from each other, begin with the parameter that does not vary, and are read back."""
    section = {**section, "low": 2e-3, "high": 2e-1, "solver": {constant: 4e-3}, "grid": 40, "snapshots": 3}
    places: dict[str, list[float]] = {split: [] for split in SPLITS}
    section |= {"coordinates": {**places, "validation": [-1.0, 1.0]}, "trajectories": {"validation": 1}}
    family = FamilyConfig.model_validate({**section, "root": str(tmp_path)})
    made = family.family()
    seeds = [trajectory_seed(0, "x", 0)]
    low, high = (initial_states(made, seeds, made.value(s)) for s in (-1, 1))
    assert (low[0] == high[0]).all()
    assert low[1].tolist() == high[1].tolist() == [4e-3]
    assert getattr(settings_at(made, 0.07), made.parameter) == 0.07
    data.generate(made, family.folder(), lambda items, *_: iter(items))
    first, last = data.read_split(made, family.folder(), "validation")
    assert (first.value, last.value) == (pytest.approx(2e-3), pytest.approx(2e-1))
    assert not bool((first.fields[:, -1] == last.fields[:, -1]).all())


def test_the_other_parameter_may_be_changed() -> None:
    dams = FamilyConfig.model_validate({"name": "shallow_water", "solver": {"dam_height": 3, "radius": [0.4, 0.5]}})
    fields, _ = initial_states(dams.family(), [trajectory_seed(0, "g", 0)], 1.0)
    assert float(fields[:, 0].max()) == 3.0
    gravity = FamilyConfig.model_validate({"name": "dam_height", "solver": {"gravity": 2.0}})
    assert initial_states(gravity.family(), [trajectory_seed(0, "g", 0)], 1.5)[1].tolist() == [2.0]
    turned = {"name": "shallow_water", "parameter": "dam_height", "low": 1.5, "high": 2.5}
    assert FamilyConfig.model_validate(turned).family().scale == "linear"


FOLDER = {"source": "mine", "name": "mine", "parameter": "nu", "low": 1.0, "high": 2.0, "values": {"validation": [1.5]}}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"name": "burgers"}, "no built-in family 'burgers': choose from reaction_diffusion, "),
        ({"parameter": "viscosity"}, "reaction_diffusion has no parameter 'viscosity': choose from diffusivity, "),
        ({"parameter": "inhibitor_diffusivity"}, "give low and high, the range of inhibitor_diffusivity"),
        ({"low": 7e-3}, "low is 0.007 and high is 0.006: give 0 < low < high"),
        ({"scale": "linear", "low": 1e-3, "high": 9e-3}, "diffusivity is -0.001 at s = -1.5 (ood_low): use the log"),
        ({"scale": "cubic"}, "family.scale should be 'log', 'sqrt' or 'linear'"),
        ({"interval": 0}, "family.interval should be greater than 0"),
        ({"solver": {"treshold": 1.0}}, "has no setting 'treshold'; the nearest is 'threshold'"),
        ({"solver": {"viscosity": 1.0}}, "has no setting 'viscosity'; choose from inhibitor_diff"),
        ({"solver": {"diffusivity": 1.0}}, "diffusivity is the parameter that varies: give low and high instead"),
        ({"solver": {"side": 0}}, "solver.side is 0: give a positive number"),
        ({"solver": {"step": "short"}}, "solver.step is 'short': give a number"),
        ({"solver": {"initial_modes": 2.5}}, "solver.initial_modes is 2.5: give a whole number"),
        (
            {"name": "shallow_water", "solver": {"walls": "open"}},
            "solver.walls is 'open': choose outflow or reflective",
        ),
        ({"name": "shallow_water", "solver": {"radius": [2, 1]}}, "solver.radius is [2.0, 1.0]: give the smallest"),
        ({"name": "shallow_water", "solver": {"courant": 0.9}}, "solver.courant is 0.9: give at most 0.5"),
        ({"name": "navier_stokes", "solver": {"forcing": -1.0}}, "solver.forcing is -1: give a number of at least 0"),
        ({"coordinates": {"suport": [0.5]}}, "family.coordinates should be 'support', 'endpoint_low'"),
        ({"coordinates": {"support": [0.5, 0.50001]}}, "two coordinates of support are equal to three decimals"),
        ({"values": {"support": [1.0]}}, "values is for a folder of your own: add source"),
        ({"table": "t.csv"}, "table is for a folder of your own: add source"),
        ({**FOLDER, "grid": 64}, "grid is for data that are generated: leave it out"),
        ({**FOLDER, "solver": {"side": 1.0}}, "solver is for data that are generated"),
        ({**FOLDER, "seed": 3}, "seed is for data that are generated"),
        ({**FOLDER, "high": None}, "a family with source needs high"),
        ({**FOLDER, "values": {}}, "values.validation is missing"),
        ({**FOLDER, "values": {"validation": [1.5], "ood_high": [1.5]}}, "1.5 is in ood_high and in validation"),
        ({**FOLDER, "values": {"validation": [2.0]}}, "2 is in endpoint_high and in validation"),
        ({**FOLDER, "values": {"validation": [1.5], "endpoint_low": [1.2]}}, "values.endpoint_low is 1, the end"),
        (FOLDER, "mine is not a folder"),
    ],
)
def test_keys_that_make_no_sense_are_refused(
    section: dict[str, Any], words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({"runs": str(tmp_path / "runs"), "family": {"root": str(tmp_path), **section}}))
    assert shodh(["expert", "data", "--config", str(path)]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error
    assert [one.name for one in tmp_path.iterdir()] == ["wrong.yaml"]


def test_an_anchor_of_another_range_is_another_dataset(tmp_path: Path) -> None:
    wider = tree(tmp_path)["family"] | {"high": 9e-3}
    assert config(tmp_path, family=wider).family.folder() != config(tmp_path).family.folder()
