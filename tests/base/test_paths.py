"""`~` and environment variables in paths: replaced from every place where a user writes one, or refused by name."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest

from shodh_moe.audit.config import AuditConfig
from shodh_moe.base.errors import UserError
from shodh_moe.base.paths import expand
from shodh_moe.base.section import Section
from shodh_moe.ccm.bench.config import BenchConfig
from shodh_moe.ccm.config import ExpertConfig
from shodh_moe.cli.main import _parser, main
from shodh_moe.config import Config
from shodh_moe.config.load import load_config, load_config_of
from shodh_moe.config.paths import resolve_paths
from shodh_moe.data.importing.mapping import load_mapping
from shodh_moe.merging.config import load_targets
from tests.tiny import refused, write_config, write_dataset


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("data", "data"),
        ("~", "/home/me"),
        ("~/data", "/home/me/data"),
        ("data/~", "data/~"),
        ("./~", "./~"),
        ("$SCRATCH", "/scratch/me"),
        ("$SCRATCH/a/${SCRATCH}b", "/scratch/me/a//scratch/meb"),
        ("~/$SCRATCH", "/home/me//scratch/me"),
        ("price$", "price$"),
    ],
)
def test_expand(written: str, meant: str) -> None:
    assert expand(written) == meant


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("$NOWHERE/data", "variable NOWHERE is not set"),
        ("data/${NOWHERE}", "variable NOWHERE is not set"),
        ("$EMPTY/data", "variable EMPTY is empty"),
        ("${SCRATCH:-/tmp}/data", "is not the name of a variable"),
        ("${}", "is not the name of a variable"),
        ("~nobody_of_this_name/data", "home folder ~nobody_of_this_name is not known"),
    ],
)
def test_what_cannot_be_expanded_is_named(written: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"^.") as error:
        expand(written)
    assert says in str(error.value)


def test_what_a_variable_holds_is_not_expanded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODD", "~/$NOWHERE")
    assert expand("$ODD/x") == "~/$NOWHERE/x"


KEYS = [
    *((Config, key) for key in ("runs", "start", "data.path", "data.root", "tokenizer.path", "tokenizer.root")),
    (Config, "parallel.hostfile"),
    *((ExpertConfig, key) for key in ("runs", "start", "family.root", "parallel.hostfile")),
    *((AuditConfig, key) for key in ("runs", "base.runs", "base.data.root", "base.tokenizer.root")),
    (BenchConfig, "runs"),
]


@pytest.mark.parametrize(("kind", "key"), KEYS)
def test_every_path_of_a_config_and_an_override_is_expanded(tmp_path: Path, kind: type[Section], key: str) -> None:
    base = {
        AuditConfig: Path("configs/audit/cpu.yaml"),
        BenchConfig: Path("configs/ccm/bench.yaml"),
    }.get(kind)  # type: ignore[call-overload]
    path = tmp_path / "config.yaml"
    path.write_text(base.read_text() if base else "")

    def value(written: str) -> object:
        found: object = load_config_of(kind, path, [f"{key}={written}"])
        for name in key.split("."):
            found = getattr(found, name)
        return found

    assert value("$SCRATCH/x") == "/scratch/me/x"
    assert value("~/x") == "/home/me/x"
    with pytest.raises(UserError, match=f"override '{key}=.*{key}: .*NOWHERE is not set"):
        value("$NOWHERE/x")


def test_a_config_file_and_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("runs: ~/runs\ndata: {root: $SCRATCH/data}\n")
    config = load_config(path)
    assert config.model_dump()["runs"] == "/home/me/runs"  # as the run folder's config.yaml stores it
    found = resolve_paths(config)
    assert (found.run.parent, found.dataset.parent) == (Path("/home/me/runs"), Path("/scratch/me/data"))


def test_paths_of_geometry_mappings_and_merges(tmp_path: Path) -> None:
    config = load_config_of(Config, write_config(tmp_path), ["data.domains.porous_media.geometry_file.path=~/rock.npy"])
    assert config.data.domains.porous_media.geometry_file.path == "/home/me/rock.npy"
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text(
        "{name: a, domain: a, output: ~/out, files: {train: [~/a.h5, [$SCRATCH/b.h5]]}, axes: [x, y, z, c], "
        "velocity: u, pressure: p, mask: {dataset: m, file: $SCRATCH/m.h5}, spacing: 1.0, time_step: 1.0, "
        "boundaries: {x: wall, y: wall, z: wall}, units: {length: m, time: s}}"
    )
    found = load_mapping(mapping)
    assert (found.output, found.files.train) == ("/home/me/out", ["/home/me/a.h5", ["/scratch/me/b.h5"]])
    assert found.mask is not None
    assert found.mask.file == "/scratch/me/m.h5"
    merge = tmp_path / "merge.yaml"
    text = "{merge_method: linear, output: $SCRATCH/out, models: [{model: ~/a}, {model: $SCRATCH/b}]}"
    merge.write_text(text)
    target = load_targets(merge)[0]
    assert (target.output, target.models) == (Path("/scratch/me/out"), ["/home/me/a", "/scratch/me/b"])
    for written, unset in (("$SCRATCH/out", "$NOWHERE/out"), ("~/a", "$NOWHERE/a")):
        merge.write_text(text.replace(written, unset))
        with pytest.raises(UserError, match="NOWHERE is not set"):
            load_targets(merge)


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield parser
    for group in groups:
        for one in group.choices.values():
            yield from commands(one)


def test_every_option_that_takes_a_path_expands_it() -> None:
    expanded = 0
    for command in commands(_parser()):
        for action in command._actions:
            assert action.type is not Path, f"{command.prog} {action.dest}: use path_option"
            if action.dest in ("config", "hostfile", "resume", "output", "checkpoint", "tokenizer", "shared", "path"):
                assert action.type is not None, f"{command.prog} {action.dest}: use path_option"
                assert str(action.type("~/x")) == "/home/me/x"
                expanded += 1
    assert expanded > 40


def test_commands_find_a_dataset_by_variable_and_refuse_an_unset_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    write_dataset(tmp_path / "theirs", grid=(8, 8, 8), snapshots=2, domains=("a",))
    assert main(["data", "info", "$SCRATCH/theirs"]) == 0
    for arguments in (["data", "info", "$NOWHERE/theirs"], ["plan", "--config", "$NOWHERE/x.yaml"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert "variable NOWHERE is not set" in capfd.readouterr().err
    config = str(write_config(tmp_path))
    refused(capfd, "plan", "--config", config, "runs=$NOWHERE/x", says=("override 'runs=", "NOWHERE is not set"))
