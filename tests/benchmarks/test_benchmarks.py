"""The benchmark scripts run, and their files have the expected contents. No test checks a time."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from shodh_moe.kernels import curl
from shodh_moe.plan.machine import from_data_sheets, write_machine

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = ("gating", "dispatch", "spectral_curl", "moe_layer", "optimizer")
PEERS = {"spectral_curl": "torch.fft", "optimizer": "torch, foreach"}  # DeepSpeed for all others
RESULT_KEYS = {
    "op", "implementation", "case", "seconds", "seconds_p20", "seconds_p80", "rounds", "bytes", "flops", "gb_s",
    "share_of_copy", "gflop_s", "peak_memory_bytes", "extra",
}  # fmt: skip


def script(name: str, *arguments: str, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "SHODH_KERNELS": "auto"},
    )


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Rehearse `make gpu` on the CPU, with every benchmark in tiny sizes. Returns the process and its folder."""
    folder = tmp_path_factory.mktemp("rehearsal")
    return script("gpu", "--rehearse", "--out", str(folder), timeout=380), folder


@pytest.fixture
def results(rehearsal: tuple[subprocess.CompletedProcess[str], Path]) -> Path:
    """Folder with the JSON file of every benchmark."""
    return rehearsal[1]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_rehearsal_of_make_gpu_runs_every_step(rehearsal: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, folder = rehearsal
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((folder / "gpu_rehearsal.json").read_text())
    steps = {step["name"]: step for step in content["steps"]}
    assert list(steps) == [
        "environment", "tests", "dispatch", "spectral_curl", "gating", "lattice_boltzmann", "walls",
        "losses triton", "losses reference", "moe_layer", "optimizer", "quickstart", "pictures",
    ]  # fmt: skip
    assert {step["status"] for step in steps.values()} == {"done"}, done.stdout
    assert steps["environment"]["result"]["packages"]["torch"]
    assert steps["tests"]["result"]["passed"] > 0
    assert content["benchmarks"].keys() == {*SCRIPTS, "lattice_boltzmann", "walls"}
    losses = content["losses"]["small network"]
    assert len(losses["triton"]) == 3
    assert losses["largest_relative_difference"] < 1e-4
    assert "deepspeed's time over ours" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", SCRIPTS)
def test_json_has_machine_versions_date_and_results(results: Path, name: str) -> None:
    content = json.loads((results / f"{name}.json").read_text())
    assert content["benchmark"] == name
    assert content["quick"] is True
    assert content["machine"].keys() >= {"date", "packages", "device_name", "threads", "cores", "python", "commit"}
    assert content["ceilings"]["copy_gb_s"] > 0
    assert content["ceilings"]["gemm_gflop_s"]["float32"] > 0
    assert {row["implementation"] for row in content["results"]} >= {"shodh", PEERS.get(name, "deepspeed")}
    for row in content["results"]:
        assert row.keys() == RESULT_KEYS
        assert 0 < row["seconds_p20"] <= row["seconds"] <= row["seconds_p80"]
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["seconds"] / 1e9)
        assert row["gflop_s"] == pytest.approx(row["flops"] / row["seconds"] / 1e9)
    assert all(check["holds"] for check in content["checks"])
    assert content["ratios"]
    if name not in ("moe_layer", "optimizer"):
        assert all("compil" in row["reason"] for row in content["not_available"])


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_terminal_shows_a_table_and_ratios(results: Path) -> None:
    text = (results / "dispatch.log").read_text()
    for words in ("copy bandwidth", "GB/s", "of copy", "time over ours: deepspeed"):
        assert words in text


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_curl_results_state_errors_and_divergence(results: Path) -> None:
    rows = json.loads((results / "spectral_curl.json").read_text())["results"]
    ours = [row for row in rows if row["implementation"] == "shodh" and row["case"]["pass"] == "forward"]
    assert {row["case"]["operator"] for row in ours} == {"spectral", "central2", "central4", "staggered"}
    for row in ours:
        assert row["extra"]["relative_error"] <= 1e-6
        assert row["extra"]["div_fp64"] <= 1e-13


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_pictures_are_drawn(results: Path) -> None:
    for name in SCRIPTS:
        for kind in ("roofline", "times"):
            assert (results / f"{name}_{kind}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_predicted_steps_are_compared_with_trainings(tmp_path: Path) -> None:
    """One layout on one rank, with given rates; a second call has nothing left to do."""
    machine, results = tmp_path / "machine.json", tmp_path / "accuracy.json"
    made = from_data_sheets("h100").model_copy(update={"device": "cpu", "memory": None})
    write_machine(machine, made)
    options = ["--quick", "--json", str(results), "--machine", str(machine), "--ranks", "1", "--steps", "2"]
    for _ in range(2):
        done = script("plan_accuracy", *options, timeout=380)
        assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(results.read_text())
    (row,) = content["results"]
    assert len(row["times"]) == 2
    assert row["predicted"] == pytest.approx(sum(row["parts"].values()))
    assert content["summary"][0]["layouts"] == 1
    assert "layouts left" not in done.stdout  # of the second call


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_curves_are_drawn(tmp_path: Path) -> None:
    picture, numbers = tmp_path / "scaling.png", tmp_path / "scaling.json"
    options = ["--quick", "--steps", "1", "--output", str(picture), "--json", str(numbers)]
    done = script("scaling_curves", *options, timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert {row["world"] for row in json.loads(numbers.read_text())["rows"]} == {8, 16}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_exchanges_are_counted(tmp_path: Path) -> None:
    """One layer of width 24, 8 tokens of 4 channels, two ranks with 4 samples each, of which half leave."""
    done = script("exchange", "--quick", "--json", str(tmp_path / "exchange.json"), timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["variant"]: row for row in json.loads((tmp_path / "exchange.json").read_text())["results"]}
    assert rows["none"]["bytes"] == rows["none"]["exchanges"] == 0
    sample = 4 * (2 + 2) * 4 * 8 + (3 + 6) * 8 + 2 * 4  # latents; domain, stride, expert and faces; norm and weight
    assert rows["sample"]["bytes"] == 2 * sample + 2 * 8 + 2 * 4  # and counts and errors
    assert rows["token"]["bytes"] == 2 * 8 * 24 * 4 * 4 + 8  # dispatch, combine and their gradients; a count
    assert (rows["sample"]["exchanges"], rows["token"]["exchanges"]) == (3, 5)
    assert rows["sample"]["samples_by_rank"] == [4, 4]
    assert rows["sample, 3:1"]["samples_by_rank"] == [5, 3]
    assert 0 < rows["deepspeed"]["in_exchanges"] < 1


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("gating", ["--experts", "8;64"], "8;64"),
        ("moe_layer", ["--cases", "4096/128"], "tokens/width/experts"),
        ("gating", ["--quick", "--device", "cpu", "--json", "/dev/null/x.json"], "/dev/null"),
        ("exchange", ["--cases", "256/2/4"], "width/depth/grid/channels/samples"),
        ("exchange", ["--ranks", "3"], "--ranks must be even numbers"),
        ("support.plot", ["nowhere.json"], "nowhere.json"),
        ("support.losses", ["--grid", "7"], "--grid"),
    ],
)
@pytest.mark.usefixtures("importable")
def test_invalid_input_ends_with_code_2_and_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, arguments: list[str], message: str
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # the scripts set these if they are unset; monkeypatch restores them
    monkeypatch.setenv("DEEPSPEED_LOG_LEVEL", "warning")
    try:
        code = importlib.import_module(name).main(arguments)
    except SystemExit as end:  # argparse exits this way
        code = end.code
    error = capfd.readouterr().err
    assert code == 2, error
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(("name", "arguments"), [("gating", ["--device", "cuda"]), ("gpu", []), ("tune", [])])
def test_without_a_gpu_it_ends_with_code_2(name: str, arguments: list[str]) -> None:
    done = script(name, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "no CUDA device" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("importable")
def test_a_step_that_overruns_or_fails_is_recorded_and_its_children_end(tmp_path: Path) -> None:
    from support.steps import Step, run_step

    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    overrun = Step("overruns", [sys.executable, "-c", parent], 3)
    outcome = run_step(overrun, tmp_path, 3, dict(os.environ))
    assert (outcome.status, outcome.reason) == ("timed out", "stopped after 3 s")
    time.sleep(0.2)
    stat = Path(f"/proc/{pid_file.read_text()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"
    fails = Step("fails", [sys.executable, "-c", "print('the last words'); raise SystemExit(3)"], 20)
    outcome = run_step(fails, tmp_path, 20, dict(os.environ))
    assert (outcome.status, outcome.reason) == ("failed", "exit code 3: the last words")


@pytest.mark.usefixtures("importable")
def test_a_peer_that_fails_is_named_and_ours_may_not_fail() -> None:
    from support.timing import Missing, Patience, Times, time_alternately

    def broken(_: Any) -> None:
        raise RuntimeError("no compiler\nsecond line")

    seen: list[int] = []
    calls = {"shodh": seen.append, "broken": broken, "absent": Missing("not installed")}
    found = time_alternately(calls, [0, 1, 2], torch.device("cpu"), Patience(0, 5, 5), lambda name: name == "shodh")
    assert list(found) == ["shodh", "broken", "absent"]
    assert isinstance(found["shodh"], Times)
    assert found["shodh"].rounds == 5
    assert found["broken"] == Missing("RuntimeError: no compiler")
    assert found["absent"] == Missing("not installed")
    assert seen[-5:] == [0, 1, 2, 0, 1]  # every call gets the next set
    with pytest.raises(RuntimeError, match="no compiler"):
        time_alternately({"shodh": broken}, [0], torch.device("cpu"), Patience(0, 1, 1), lambda name: True)


@pytest.mark.usefixtures("importable")
def test_input_sets_exceed_twice_the_cache() -> None:
    from support.timing import cache_bytes, rotating

    device = torch.device("cpu")
    size = cache_bytes(device) // 3
    assert len(rotating(lambda seed: seed, size, device)) * size >= 2 * cache_bytes(device)
    assert rotating(lambda seed: seed, 10 * cache_bytes(device), device) == [0]


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("operator", ["spectral", "central2", "central4", "staggered"])
def test_the_peers_of_the_curl_compute_the_curl(operator: str) -> None:
    from support.peers import FourierCurl, MatrixCurl

    shape = (8, 10, 12)
    a = torch.randn(2, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = curl(a, None, operator, 0.3)
    for form in (FourierCurl, MatrixCurl):
        torch.testing.assert_close(
            form(shape, operator, 0.3, torch.float64, "cpu")(a), expected, rtol=1e-11, atol=1e-11
        )


def test_the_tuning_rehearsal_writes_only_its_own_file(tmp_path: Path) -> None:
    table = ROOT / "kernels" / "tuned.json"
    before = table.read_bytes() if table.exists() else None
    done = script("tune", "--rehearse", "--only", "dispatch", "--seconds", "3", "--file", str(tmp_path / "tuned.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "entries differ from the defaults" in done.stdout
    assert (table.read_bytes() if table.exists() else None) == before


@pytest.mark.usefixtures("importable")
def test_tuned_entries_are_merged_into_the_table(tmp_path: Path) -> None:
    import tune

    file, device = tmp_path / "tuned.json", torch.device("cpu")
    file.write_text('{"GPU": {"gating": {"E8": {"num_warps": 4}}}, "cpu": {"gating": {"E4": {"num_warps": 1}}}}')
    tune.keep(file, device, {("gating", "E8"): {"num_warps": 2}})
    assert json.loads(file.read_text()) == {
        "GPU": {"gating": {"E8": {"num_warps": 4}}},
        "cpu": {"gating": {"E4": {"num_warps": 1}, "E8": {"num_warps": 2}}},
    }
