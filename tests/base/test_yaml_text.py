"""YAML of users: every reader refuses a key that stands twice, with both lines, and any other text that is not YAML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from shodh_moe.audit.config import AuditConfig
from shodh_moe.base.errors import UserError
from shodh_moe.base.yaml_text import parse_yaml
from shodh_moe.ccm.bench.config import BenchConfig
from shodh_moe.ccm.config import ExpertConfig
from shodh_moe.config.load import load_config, load_config_of
from shodh_moe.data.check import check_files
from shodh_moe.data.importing.mapping import load_mapping
from shodh_moe.data.stats import FieldStats
from shodh_moe.merging.config import load_targets
from shodh_moe.runs.folder import claim_run_folder
from tests.tiny import config, write_dataset


def test_numbers_are_those_of_yaml_1_2() -> None:
    assert parse_yaml("a: 1e-3\nb: 1\nc: [.5E+2, x1e3]") == {"a": 0.001, "b": 1, "c": [50.0, "x1e3"]}
    assert parse_yaml("") is None


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' stands in line 1 and again in line 3"),
        ("a: 1\n'a': 1\n", "the key 'a' stands in line 1 and again in line 2"),
        ("top:\n  x:\n    a: 1\n    b: 2\n    a: {}\n", "the key 'a' stands in line 3 and again in line 5"),
        ("- {a: 1, a: 2}", "the key 'a' stands in line 1 twice"),
        ("1: x\n1: y\n", "the key 1 stands in line 1 and again in line 2"),
        ("base: &base {a: 1}\nuse:\n  <<: *base\n  a: 2\n  a: 3\n", "line 4 and again in line 5"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(text: str, where: str) -> None:
    with pytest.raises(ValueError, match="keep one of them") as error:
        parse_yaml(text)
    assert where in str(error.value)


def test_the_same_key_in_two_mappings_and_a_merged_key_are_accepted() -> None:
    assert parse_yaml("x: {a: 1}\ny: {a: 2}") == {"x": {"a": 1}, "y": {"a": 2}}
    text = "x: &x {a: 1, b: 2}\ny: &y {c: 3}\nz:\n  a: 4\n  <<: [*x, *y]"
    assert parse_yaml(text)["z"] == {"a": 4, "b": 2, "c": 3}


@pytest.mark.parametrize("text", ["[1", "a: 2024-99-99", "[" * 10_000, "0x_", "{[a]: 1}", "!!python/object:x {}", "\0"])
def test_anything_else_that_is_not_yaml_is_a_value_error_of_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^.") as error:
        parse_yaml(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "read",
    [
        load_config,
        lambda path: load_config_of(ExpertConfig, path),
        lambda path: load_config_of(AuditConfig, path),
        lambda path: load_config_of(BenchConfig, path),
        load_mapping,
        load_targets,
    ],
)
def test_every_reader_of_configs_refuses_it(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: a\noutput: x\nname: b\n")
    with pytest.raises(UserError, match=r"c\.yaml: the key 'name' stands in line 1 and again in line 3: keep one"):
        read(path)


def test_so_do_overrides_run_folders_and_statistics(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: a")
    with pytest.raises(UserError, match=r"override 'training=.*': the key 'steps' stands in line 1 twice"):
        load_config(path, ["training={steps: 1, steps: 2}"])
    own = config(runs=str(tmp_path / "runs"))
    claim_run_folder(own)
    stored = tmp_path / "runs/tiny/config.yaml"
    stored.write_text("seed: 0\n" + stored.read_text())
    with pytest.raises(UserError, match=r"config\.yaml is damaged \(the key 'seed' stands in line 1 and again in line"):
        claim_run_folder(own)
    dataset = write_dataset(tmp_path / "data", grid=(8, 8, 8), snapshots=2, domains=("a",))
    stats = dataset / "stats.yaml"
    stats.write_text(stats.read_text() + "rms: " + str(yaml.safe_load(stats.read_text())["rms"]))
    with pytest.raises(UserError, match="the key 'rms' stands in line"):
        FieldStats.load(dataset)
    assert any("the key 'rms' stands in line" in finding.text for finding in check_files(dataset).findings)
