"""The `shodh` command: help, arguments, exit codes, and invalid configs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.cli import main
from shodh_moe.runs import pipeline
from tests.tiny import refused, shodh, tree, write_config


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a config in it."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    return tmp_path


# Help, arguments and exit codes.


@pytest.mark.parametrize(
    "command",
    [
        "",
        "run",
        "data",
        "data generate",
        "tokenizer",
        "tokenizer train",
        "tokenizer encode",
        "pretrain",
        "evaluate",
        "report",
    ],
)
def test_help_shows_an_example_to_copy(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main([*command.split(), "--help"])
    assert exited.value.code == 0
    shown = {"": "run", "data": "data generate", "tokenizer": "tokenizer train"}.get(command, command)
    example = f"example: shodh {shown} --config configs/quickstart.yaml --name trial training.steps=200"
    assert example in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ("predict", "predict --checkpoint runs/trial --input flow.hdf5 --steps 10 --output prediction.hdf5"),
        ("plan", "plan --config configs/cluster_8x8.yaml --world 1024 --gpu h100 --network ib-ndr"),
        ("finetune", "finetune --model quickstart_model --data my_flows --output my_model"),
        ("merge upcycle", "merge upcycle dense_model --experts 4 --output mixture_model"),
        ("checkpoint", "checkpoint export runs/trial --output trial_model"),
        ("checkpoint inspect", "checkpoint inspect runs/trial"),
        ("checkpoint verify", "checkpoint verify runs/trial"),
        ("checkpoint export", "checkpoint export runs/trial --output trial_model"),
        ("merge", "merge configs/merge/example.yaml"),
        ("merge sweep", "merge sweep configs/merge/example.yaml --part 0 --of 4"),
        ("merge mixture", "merge mixture configs/merge/mixture.yaml"),
        ("data import", "data import configs/import/jhtdb_channel.yaml"),
        ("data check", "data check data/quickstart"),
        ("data info", "data info data/quickstart"),
        ("data preview", "data preview data/quickstart --output pictures"),
        ("doctor", "doctor --hostfile hostfile --shared runs"),
    ],
)
def test_help_of_commands_without_a_config(command: str, example: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main([*command.split(), "--help"])
    assert exited.value.code == 0
    assert f"example: shodh {example}" in capsys.readouterr().out.splitlines()


def test_a_plan_needs_no_gpu(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shodh("plan", "--world", "4", "model.moe.num_experts=4") == 0
    shown = capsys.readouterr().out
    assert "4: EP 4, EDP 1" in shown
    assert "memory per GPU" in shown
    refused(capsys, "plan", "--config", "tiny.yaml", "--world", "0", says=("--world 0", "at least 1"))


def test_a_plan_has_times_and_layouts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--world", "4", "--gpu", "h100", "--simulate", "--steps", "2", "model.moe.num_experts=4"]
    assert shodh("plan", *options) == 0
    shown = capsys.readouterr().out
    for words in ("step time", "tokens per second", "GPU hours", "layouts: ", "the fastest: ", "simulated: 2 steps"):
        assert words in shown


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("", "--config is missing"),
        ("--config tiny.yaml --simulate", "--simulate needs a machine"),
        ("--config tiny.yaml --gpu v100", "--gpu v100 is not known: the nearest is h100"),
        ("--config tiny.yaml --gpu h100 --network x", "--network x is not known: "),
        ("--config tiny.yaml --world 3 --global-batch 8", "the nearest numbers of ranks that can are 2 or 4"),
        ("--config tiny.yaml --world 2 --global-batch 3", "cannot be divided among the domains"),
        ("--config tiny.yaml --gpu h100 --steps 0", "--steps 0"),
        ("--config tiny.yaml --machine tiny.yaml", "tiny.yaml is damaged"),
        ("--config tiny.yaml --gpu h100 --simulate --load data", "no routing record"),
        ("--measure --ranks 0", "--ranks 0"),
        ("--measure --output tiny.yaml/machine.json", "tiny.yaml"),
    ],
)
def test_a_plan_refuses(here: Path, capsys: pytest.CaptureFixture[str], options: str, says: str) -> None:
    refused(capsys, "plan", *options.split(), says=(says,))
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["run"],
        ["run", "--config"],
        ["run", "--config", "x", "--training.steps=3"],
        ["tokenizer"],
        ["checkpoint"],
        ["checkpoint", "export", "x"],
        ["checkpoint", "verify", "x", "training.steps=3"],
        ["predict", "--checkpoint", "x", "--input", "y", "--output", "z", "--steps", "many"],
    ],
)
def test_invalid_arguments_give_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "--help`" in error


def test_overrides_may_come_before_and_after_options(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(pipeline, "make_data", lambda config, paths: seen.append(config))
    assert (
        main(["data", "generate", "training.steps=6", "--config", "tiny.yaml", "seed=5", "--name", "n", "data.seed=7"])
        == 0
    )
    assert (seen[0].training.steps, seen[0].seed, seen[0].data.seed, seen[0].name) == (6, 5, 7, "n")


@pytest.mark.parametrize(
    ("options", "resume"), [([], "auto"), (["--resume", "runs/a/checkpoints/5"], "runs/a/checkpoints/5")]
)
def test_pretrain_resumes_from_a_checkpoint(
    here: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], resume: str
) -> None:
    seen = []
    monkeypatch.setattr(pipeline, "pretrain", lambda config, paths, resume: seen.append(resume))
    assert shodh("pretrain", *options) == 0
    assert seen == [resume]


def test_checkpoint_commands_name_what_is_missing(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for step in ("inspect", "verify"):
        refused(capfd, "checkpoint", step, "nowhere", says=("nowhere is not a checkpoint and contains none",))
    refused(capfd, "checkpoint", "export", "nowhere", "--output", "x", says=("there is no folder nowhere",))


def test_an_unexpected_exception_shows_a_traceback(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "make_data", lambda config, paths: {}["nothing"])
    assert shodh("data", "generate") == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "KeyError: 'nothing'" in error


def test_debug_adds_a_traceback_to_wrong_input(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shodh("data", "generate", "--debug", "training.stpes=3") == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("error: ")


def test_a_message_of_several_lines_becomes_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stage(config: object, paths: object) -> None:
        raise UserError("HDF5 says\n  this\n  and that")

    monkeypatch.setattr(pipeline, "make_data", stage)
    assert refused(capfd, "data", "generate", "--config", "tiny.yaml", says=()) == "error: HDF5 says this and that\n"


def test_the_command_as_a_process_gives_an_exit_code_and_one_line(here: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shodh_moe.cli", "run", "--config", "nowhere.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: cannot read config nowhere.yaml: No such file or directory; check --config\n"


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("--help", 141),
        ("data info --help", 141),
        ("doctor", 141),
        ("plan --config tiny.yaml", 141),
        ("plan --config nowhere.yaml", 2),
    ],
)
def test_a_reader_that_ends_gives_no_traceback(here: Path, command: str, code: int) -> None:
    """`true` reads nothing, and has ended before the command prints."""
    script = f"(sleep 0.1; exec {sys.executable} -m shodh_moe.cli {command}) | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout == f"{code}\n"
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


# Configs.


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: [", "not valid YAML"),
        (b"- a\n- b\n", "must hold `key: value` lines, not a list"),
        (b"just words", "not a str"),
        (b"\x89HDF\r\n\x1a\n\xff", "c.yaml"),
    ],
)
def test_a_file_that_is_not_a_config(here: Path, capfd: pytest.CaptureFixture[str], content: bytes, says: str) -> None:
    (here / "c.yaml").write_bytes(content)
    refused(capfd, "run", "--config", "c.yaml", says=("c.yaml", says))
    refused(capfd, "run", "--config", ".", says=("cannot read config .", "directory"))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.moe.num_expert=4"], ("unknown key", "nearest valid key is 'model.moe.num_experts'")),
        (["training.steps=many"], ("training.steps", "integer", "'many'")),
        (["model.moe.num_experts=3", "parallel.ep_size=2"], ("num_experts 3", "ep_size 2")),
        (["parallel.processes=3", "parallel.ep_size=2"], ("ep_size 2", "world size 3")),
        (["data.grid=[16, 16, 12]"], ("data.grid", "compression 8")),
        (["model.patch=4"], ("data.grid", "model.patch 4")),
        (["model.history=5"], ("model.history 5", "data.snapshots")),
        (["training.batch_size=3"], ("training.batch_size 3", "2 domains")),
        (["data.domains={open_channel: null, porous_media: null}"], ("data.domains", "at least one")),
        (["name=../x"], ("name", "'../x'")),
        (["data.path=nowhere"], ("data.path", "nowhere", "give an existing one")),
        (["tokenizer.path=nowhere"], ("tokenizer.path", "nowhere")),
    ],
)
@pytest.mark.parametrize("command", ["run", "tokenizer train", "pretrain"])
def test_an_invalid_config_is_refused_before_anything_is_made(
    here: Path, capfd: pytest.CaptureFixture[str], command: str, overrides: list[str], says: tuple[str, ...]
) -> None:
    refused(capfd, *command.split(), "--config", "tiny.yaml", *overrides, says=says)
    assert set(tree(here)) == {"tiny.yaml"}


@pytest.mark.parametrize("name", ["", "..", "a/b"])
def test_a_run_name_stays_in_the_runs_folder(here: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
    refused(capfd, "run", "--config", "tiny.yaml", "--name", name, says=(f"--name {name!r}", "name should"))
    assert set(tree(here)) == {"tiny.yaml"}
