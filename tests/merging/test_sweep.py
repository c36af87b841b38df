"""Sweeps over alphas and over several configs: their targets, their shares, and targets that repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.cli import main as shodh
from shodh_moe.merging.sweep import load_sweep, parse_alphas
from tests.merging.models import bits, config, files_of, load, network, save
from tests.tiny import tree

PAIR = ["low.safetensors", "high.safetensors"]
HIGH = network(2, near=network())


@pytest.fixture(autouse=True)
def experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(network(1, near=network()), Path("low.safetensors"))
    save(HIGH, Path("high.safetensors"))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Check that `shodh merge sweep` refuses in one line and changes nothing; return the line."""
    before = tree(Path())
    assert shodh(["merge", "sweep", *arguments]) == 2
    assert tree(Path()) == before
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_alphas_of_the_command_line() -> None:
    assert parse_alphas("-1.5,0,0.25") == [-1.5, 0, 0.25]
    assert parse_alphas("-0.3:0.3:7") == [-0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3]
    for text in ("", "a", "1,", "0:1", "0:1:1", "0:1:2.5", "0:1:1000000000", "0:nan:x", "0:1:3:4"):
        with pytest.raises(UserError, match="FROM:TO:COUNT"):
            parse_alphas(text)


def test_parts_of_a_sweep_make_what_one_process_makes(capsys: pytest.CaptureFixture[str]) -> None:
    # The config's own coordinate is replaced.
    ends = [("low.safetensors", {"coordinate": 1}), ("high.safetensors", {"coordinate": 3})]
    line = config(Path(), "ccm", ends, "line.yaml", parameters={"coordinate": 2.5}, output="whole")
    assert shodh(["merge", "sweep", str(line), "--alpha=-1:1:5"]) == 0
    assert sorted(path.name for path in Path("whole").iterdir()) == [
        f"alpha={alpha}" for alpha in ("-0.5", "-1.0", "0.0", "0.5", "1.0")
    ]
    assert bits(load(Path("whole/alpha=1.0"))["double"]) == bits(HIGH["double"])
    for part in (2, 0, 1):
        made = len(list(Path("parts").glob("*")))
        arguments = ["--alpha=-1:1:5", "--output", "parts", "--part", str(part), "--of", "3"]
        assert shodh(["merge", "sweep", str(line), *arguments]) == 0
        count = len(range(part, 5, 3))
        assert len(list(Path("parts").glob("*"))) == made + count
        assert f"[sweep] share {part + 1} of 3: {count} of 5 targets" in capsys.readouterr().out
    assert files_of(Path("parts")) == files_of(Path("whole"))
    # A share that was made is kept; a missing target is made again.
    assert shodh(["merge", "sweep", str(line), *arguments]) == 0
    assert capsys.readouterr().out.count("exists already") == count


def test_several_configs_in_one_sweep() -> None:
    line = config(Path(), "ccm", PAIR, "line.yaml", sweep={"alpha": [-1, 1]}, output="a")
    soup = config(Path(), "linear", PAIR, "soup.yaml", parameters={"weight": 0.5}, output="b")
    assert shodh(["merge", "sweep", str(line), str(soup)]) == 0
    assert {str(path.parent) for path in Path().glob("*/**/merge.json")} == {"a/alpha=-1", "a/alpha=1", "b"}
    # One output folder has a folder for each config.
    assert [str(one.output) for one in load_sweep([line, soup], Path("all"))] == [
        "all/line/alpha=-1",
        "all/line/alpha=1",
        "all/soup",
    ]
    assert [str(one.output) for one in load_sweep([soup], Path("all"))] == ["all"]


@pytest.mark.parametrize(
    ("sweep", "first", "second"),
    [
        ({"alpha": [0.5, 1, 1.0]}, "alpha=1", "alpha=1.0"),
        ({"alpha": [0, -0.0]}, "alpha=0", "alpha=-0.0"),
        ([{"name": "a"}, {"name": "b"}], "a", "b"),
        ([{"name": "a", "parameters": {"alpha": 0.5}}, {"name": "b", "parameters": {"alpha": 0.5}}], "a", "b"),
        ([{"name": "a", "dtype": "float32"}, {"name": "b", "out_dtype": "float32"}], "a", "b"),
        (
            [
                {"name": "a", "parameters": {"alpha": [{"filter": "lift", "value": 1}, {"value": 0}]}},
                {"name": "b", "parameters": {"alpha": [{"filter": "lift", "value": 1.0}, {"value": 0}]}},
            ],
            "a",
            "b",
        ),
    ],
)
def test_targets_that_repeat_are_refused(
    sweep: Any, first: str, second: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config(Path(), "ccm", PAIR, parameters={"alpha": 0.25}, sweep=sweep, output="out")
    assert f"out/{first} and out/{second} are the same merge" in refused(capsys, str(path))
    before = tree(Path())
    assert shodh(["merge", str(path)]) == 2
    assert tree(Path()) == before


def test_models_in_another_order_are_the_same_merge(capsys: pytest.CaptureFixture[str]) -> None:
    words = {"parameters": {"weight": 0.5}}
    one = config(Path(), "linear", PAIR, "one.yaml", output="one", **words)
    two = config(Path(), "linear", PAIR[::-1], "two.yaml", output="two", **words)
    assert "one and two are the same merge" in refused(capsys, str(one), str(two))
    # Without coordinates, the order of ccm's models has a meaning.
    one = config(Path(), "ccm", PAIR, "one.yaml", output="one", parameters={"alpha": 1})
    two = config(Path(), "ccm", PAIR[::-1], "two.yaml", output="two", parameters={"alpha": 1})
    assert shodh(["merge", "sweep", str(one), str(two)]) == 0


def test_outputs_that_collide_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = config(Path(), "ccm", PAIR, "line.yaml", parameters={"alpha": 0.5}, output="out")
    other = config(Path(), "ccm", PAIR, "other.yaml", parameters={"alpha": 0.7}, output="./out")
    inner = config(Path(), "ccm", PAIR, "inner.yaml", sweep={"alpha": [0, 1]}, output="out")
    assert "two targets of the sweep write out" in refused(capsys, str(line), str(other))
    assert "out/alpha=0 is inside of out" in refused(capsys, str(inner), str(line))
    Path("sub").mkdir()
    again = config(Path("sub"), "ccm", PAIR, "line.yaml", parameters={"alpha": 0.7})
    assert "two targets of the sweep write all/line" in refused(capsys, str(line), str(again), "--output", "all")
    assert "two targets of the sweep write out" in refused(capsys, str(line), str(line))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["line.yaml", "--alpha=0,0"], "two outputs named alpha=0.0"),
        (["line.yaml", "--alpha=0:1"], "alpha '0:1' is neither a list"),
        (["swept.yaml", "--alpha=0,1"], "swept.yaml has a sweep of its own"),
        (["soup.yaml", "--alpha=0,1"], "linear takes no parameter 'alpha'"),
        (["line.yaml", "--alpha=0,nan"], "finite"),
        (["line.yaml", "--part", "2", "--of", "2"], "--part 2 --of 2"),
        (["line.yaml", "--part", "-1", "--of", "2"], "--part -1 --of 2"),
        (["line.yaml", "absent.yaml"], "absent.yaml"),
        (["line.yaml", "filtered.yaml"], "filter 'lft' matches none of the 10 tensors"),
        (["line.yaml", "--memory-limit", "much"], "'much' is not a size"),
    ],
)
def test_wrong_sweeps_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    config(Path(), "ccm", PAIR, "line.yaml", parameters={"alpha": 0.5}, output="line")
    config(Path(), "ccm", PAIR, "swept.yaml", sweep={"alpha": [0, 1]}, output="swept")
    config(Path(), "linear", PAIR, "soup.yaml", parameters={"weight": 0.5}, output="soup")
    lft = {"alpha": [{"filter": "lft", "value": 1}, {"value": 0}]}
    config(Path(), "ccm", PAIR, "filtered.yaml", parameters=lft, output="filtered")
    assert message in refused(capsys, *arguments)
