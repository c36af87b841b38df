"""Exported models: contents of the folder, refusals, and independence of DeepSpeed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from shodh_moe.base.errors import UserError
from shodh_moe.base.files import sha256
from shodh_moe.cli import main
from shodh_moe.config.load import load_config
from shodh_moe.inference import export as module
from shodh_moe.inference.export import export
from shodh_moe.inference.loading import find_source, load_source, read_weights, verify_export, weights_sha256
from shodh_moe.tokenizer import Tokenizer
from tests.merging.models import files_of
from tests.tiny import refused, tree
from tests.trained import GRID, RECORD, make_run, run_config

DAMAGED = [
    "model.safetensors",
    "contexts.safetensors",
    "config.yaml",
    "config.json",
    "tokenizer/tokenizer.safetensors",
    "tokenizer/tokenizer.json",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was evaluated and exported through the command, without DeepSpeed."""
    folder = tmp_path_factory.mktemp("export")
    run = make_run(folder)
    config, flow = str(run / "config.yaml"), str(folder / "theirs/data/test/calm.hdf5")
    commands = [
        ["evaluate", "--config", config],
        ["checkpoint", "export", str(run), "--output", str(folder / "model")],
        ["evaluate", "--config", config, "--checkpoint", str(folder / "model"), "--output", str(folder / "measured")],
        ["predict", "--checkpoint", str(folder / "model"), "--input", flow, "--steps", "1", "--output", "out.hdf5"],
    ]
    code = (
        "import json, sys; sys.modules['deepspeed'] = None; from shodh_moe.runs import pipeline; "
        "from shodh_moe.config.load import load_config; from shodh_moe.config.paths import resolve_paths; "
        "from shodh_moe.cli import main\n"
        "commands = json.loads(sys.argv[1]); config = load_config(commands[0][2])\n"
        "pipeline.make_latents(config, resolve_paths(config))\n"
        "sys.exit(max(main(command) for command in commands))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], cwd=folder, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run, for a test to change."""
    return Path(shutil.copytree(finished / "runs/trained", tmp_path / "runs/trained"))


@pytest.fixture
def model(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "model", tmp_path / "model"))


def test_the_folder_is_complete_and_hashed(finished: Path) -> None:
    model, run = finished / "model", finished / "runs/trained"
    described = json.loads((model / "export.json").read_text())
    names = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()}
    assert names == {*DAMAGED, "metrics.json", "README.md", "export.json"}
    assert described["sha256"] == {name: sha256(model / name) for name in names - {"README.md", "export.json"}}
    assert (described["format"], described["step"], described["ep_size"]) == (1, 7, 1)
    assert (described["grid"], described["latent_grid"]) == ([16, 8, 24], [2, 1, 3])
    weights, trained = load_file(model / "model.safetensors"), read_weights(find_source(run))
    assert weights.keys() == trained.keys() == load_source(find_source(model)).transformer.state_dict().keys()
    assert all(torch.equal(weights[name], trained[name]) for name in trained)
    experts = [tensor for name, tensor in weights.items() if ".experts." in name]
    assert experts
    assert {len(tensor) for tensor in experts} == {load_config(model / "config.yaml").model.moe.num_experts}
    assert json.loads((model / "metrics.json").read_text()) == json.loads((run / "metrics.json").read_text())


def test_an_export_to_a_url_is_the_same_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHODH_CACHE", str(tmp_path / "cache"))
    assert main(["checkpoint", "export", str(run), "--output", str(tmp_path / "model")]) == 0
    assert main(["checkpoint", "export", str(run), "--output", "memory://bucket/model"]) == 0
    fs = fsspec.filesystem("memory")
    fs.get("/bucket/model", str(tmp_path / "copy"), recursive=True)
    assert files_of(tmp_path / "copy") == files_of(tmp_path / "model")
    assert verify_export(tmp_path / "copy") == []
    assert not list((tmp_path / "cache").glob("export-*"))
    command = ["checkpoint", "export", str(run), "--output", "memory://bucket/model"]
    refused(capfd, *command, says=("memory://bucket/model exists: choose a new folder",))
    with pytest.raises(SystemExit):
        main(["checkpoint", "export", "s3://a/run", "--output", "x"])
    assert "s3://a/run is a URL, and only a local path is possible here" in capfd.readouterr().err


def test_an_exported_model_has_the_metrics_of_its_run(finished: Path) -> None:
    own, elsewhere = (
        json.loads((folder / "metrics.json").read_text())
        for folder in (finished / "runs/trained", finished / "measured")
    )
    assert own["throughput"] == {"tokens_per_second": RECORD["tokens_per_second"], "step_ms_median": RECORD["step_ms"]}
    # An export does not record the training speed.
    assert elsewhere.pop("throughput") == {"tokens_per_second": None, "step_ms_median": None}
    assert elsewhere.pop("peak_memory_bytes") is None
    assert elsewhere == {key: own[key] for key in elsewhere}
    arrays = [np.load(folder / "evaluation.npz") for folder in (finished / "runs/trained", finished / "measured")]
    np.testing.assert_array_equal(arrays[0]["calm/pred"], arrays[1]["calm/pred"])
    # The tokenizer is the same, so its latents were not regenerated.
    assert len(list(finished.glob("tokenizers/*/latents/*"))) == 1


def test_the_card_of_an_evaluated_model(finished: Path) -> None:
    card, metrics = (
        (finished / "model/README.md").read_text(),
        json.loads((finished / "model/metrics.json").read_text()),
    )
    for domain in ("calm", "wild"):
        values = metrics["domains"][domain]
        row = [f"{values[f'latent_mse{end}']:.4g}" for end in ("", "_persistence", "_mean")]
        assert f"| {domain} | latent MSE | {row[0]} | {row[1]} | {row[2]} |" in card
        assert f"- {domain}: 1: {values['rollout_nrmse'][0]:.3g}" in card
    head = yaml.safe_load(card.split("---\n")[1])  # what the model hub reads
    assert (head["license"], head["library_name"]) == ("unknown", "shodh_moe")
    calm, wild = head["model-index"][0]["results"]
    assert (calm["dataset"]["type"], wild["dataset"]["type"]) == ("calm", "wild")
    shown = {one["type"]: one["value"] for one in calm["metrics"]}
    assert shown["velocity_vrmse"] == metrics["domains"]["calm"]["velocity_vrmse"]
    # The weights are random, and the card must not claim otherwise.
    assert "Not better than a baseline: latent MSE in calm" in card
    assert f"{metrics['divergence']['rms_relative']:.1e}" in card
    for words in (
        "## Data",
        "`theirs`",
        "## Limits",
        "16 x 8 x 24",
        "Free-running errors grow",
        "Apache-2.0",
        "## Use",
    ):
        assert words in card
    assert "Synthetic" not in card  # the origin of these data is unknown
    assert "| calm | 1 | " in card
    assert "reynolds 1 to 1" in card


def test_the_card_of_a_model_that_was_not_evaluated(run: Path, tmp_path: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    for text in (None, "{", json.dumps({**metrics, "weights_sha256": "of another checkpoint"})):
        (run / "metrics.json").unlink(missing_ok=True)
        if text:
            (run / "metrics.json").write_text(text)
        model = export(run, tmp_path / "model")
        assert "have not been evaluated" in (model / "README.md").read_text()
        assert not (model / "metrics.json").exists()
        shutil.rmtree(model)


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("missing", [True, False])
def test_a_damaged_export_is_refused_by_name(
    model: Path, capfd: pytest.CaptureFixture[str], name: str, missing: bool
) -> None:
    path = model / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()
    if not missing:
        path.write_bytes(data)
    says = (str(path), "missing" if missing else "damaged")
    refused(
        capfd, "predict", *f"--checkpoint {model} --input a --steps 1 --output b.hdf5".split(), says=("a does not",)
    )
    with pytest.raises(UserError, match=name):
        find_source(model)
    refused(capfd, "checkpoint", "verify", str(model), says=says)


def test_every_damage_gets_a_line(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(model)]) == 0
    (model / "README.md").write_text("my own words")
    assert main(["checkpoint", "verify", str(model)]) == 0
    (model / "config.yaml").write_text("name: other")
    (model / "model.safetensors").unlink()
    capfd.readouterr()
    assert main(["checkpoint", "verify", str(model)]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "config.yaml is damaged" in lines[0]
    assert "model.safetensors is missing" in lines[1]
    for text in ("{", "[]", '{"format": 1}', '{"format": 1, "sha256": {}}'):
        (model / "export.json").write_text(text)
        refused(capfd, "checkpoint", "verify", str(model), says=("export.json is damaged",))
    described = {"format": 9, "sha256": dict.fromkeys(DAMAGED, "")}
    (model / "export.json").write_text(json.dumps(described))
    refused(capfd, "checkpoint", "verify", str(model), says=("format 9", "reads 1"))


def test_a_damaged_checkpoint_is_not_exported(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = next((run / "checkpoints/7").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    output = ["--output", str(tmp_path / "model")]
    refused(capfd, "checkpoint", "export", str(run / "checkpoints/7"), *output, says=(file.name, "hash"))
    refused(capfd, "checkpoint", "verify", str(run), says=("checkpoints/7", file.name, "hash"))
    assert main(["checkpoint", "export", str(run), *output]) == 2
    assert not (tmp_path / "model").exists()


def test_invalid_exports_are_refused(
    run: Path, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def arguments(path: Path, name: str = "new") -> list[str]:
        return ["checkpoint", "export", str(path), "--output", str(tmp_path / name)]

    refused(capfd, *arguments(run, "model"), says=(f"{model} exists",))
    refused(capfd, *arguments(model), says=("is an exported model already",))
    refused(capfd, *arguments(tmp_path), says=("no checkpoint and no exported model",))
    refused(capfd, *arguments(run), "--tokenizer", "nowhere", says=("nowhere", "--tokenizer"))
    other = Tokenizer(run_config(tmp_path).tokenizer, list(GRID))
    other.save(tmp_path / "other")
    refused(capfd, *arguments(run), "--tokenizer", str(tmp_path / "other"), says=("of another tokenizer",))
    shutil.rmtree(tmp_path / "other")

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "model_card", full)
    refused(capfd, *arguments(run), says=("cannot write", "no space left"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "runs"]


def test_weights_of_another_architecture_are_refused(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tree_before = tree(finished)

    def evaluate(*overrides: str, says: tuple[str, ...]) -> None:
        arguments = ["--config", str(finished / "model/config.yaml"), "--checkpoint", str(finished / "model")]
        refused(capfd, "evaluate", *arguments, "--output", str(tmp_path / "m"), *overrides, says=says)

    evaluate("model.dim=48", says=("embed.weight is [24, 48] as saved and [48, 48] in the model",))
    evaluate("model.depth=1", says=("unknown to the model: blocks.1.",))
    evaluate("model.moe.num_experts=4", says=("is [2, ", "as saved and [4, "))
    evaluate("model.heads=1", says=("blocks.0.attention.", "is [12] as saved and [24] in the model"))
    # Here all shapes are the same.
    evaluate("model.moe.router.min_temperature=0.5", says=("model.moe.router.min_temperature (0.01 there, 0.5 here)",))
    assert tree(finished) == tree_before
    assert not (tmp_path / "m").exists()


def test_weights_that_do_not_match_their_config_are_refused(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = load_file(model / "model.safetensors")
    weights["head.bias"] = weights["head.bias"][:-1].clone()
    save_file(weights, model / "model.safetensors")
    described = json.loads((model / "export.json").read_text())
    described["sha256"]["model.safetensors"] = sha256(model / "model.safetensors")
    (model / "export.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"head.bias is \[15\] as saved and \[16\] in the model"):
        load_source(find_source(model))


def test_evaluating_an_export_needs_an_output_and_the_data(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, model = ["--config", str(finished / "model/config.yaml")], str(finished / "model")
    refused(capfd, "evaluate", *config, "--checkpoint", model, says=("--checkpoint and --output belong together",))
    refused(capfd, "evaluate", *config, "--output", "x", says=("--checkpoint and --output belong together",))
    text = yaml.safe_load((finished / "model/config.yaml").read_text())
    text["data"]["grid"] = [16, 16, 16]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(text))
    arguments = ["--config", str(tmp_path / "c.yaml"), "--checkpoint", model, "--output", str(tmp_path / "m")]
    refused(capfd, "evaluate", *arguments, says=("grid [16, 8, 24]", "[16, 16, 16]"))


def test_the_hash_of_weights_depends_on_all_of_them() -> None:
    weights = {"a": torch.zeros(2, 3), "b": torch.tensor(1.0)}
    same = {"b": torch.tensor(1.0), "a": torch.zeros(3, 2).T}
    assert weights_sha256(weights) == weights_sha256(same)
    others = [
        {**weights, "b": torch.tensor(2.0)},
        {**weights, "a": torch.zeros(3, 2)},
        {**weights, "a": torch.zeros(2, 3, dtype=torch.int32)},
        {"c": weights["a"], "b": weights["b"]},
    ]
    assert len({weights_sha256(one) for one in (weights, *others)}) == 5
