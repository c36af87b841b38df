"""Models on the model hub: uploads and downloads, through a real server on this machine, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.base.network import free_port
from shodh_moe.cli import main
from shodh_moe.inference import load_model
from shodh_moe.inference.export import export
from tests.hub_server import OWNER, TOKEN, Hub, hub_server
from tests.tiny import refused
from tests.trained import make_run

pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    export(make_run(folder), folder / "model")
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub, for this process and those that a test starts."""
    from huggingface_hub import constants

    with hub_server() as server:
        for name, value in {
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def push(folder: Path, *more: str) -> int:
    return main(["checkpoint", "push", str(folder), *more])


def test_a_model_goes_to_the_hub_and_comes_back(
    exported: Path, hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert push(exported / "model", f"{OWNER}/trial") == 0
    assert f"[push] {hub.url}/{OWNER}/trial" in capfd.readouterr().out
    assert hub.messages == ["trained, step 7"]
    there = hub.repositories[f"{OWNER}/trial"].files("main")
    assert there is not None
    own = {
        str(path.relative_to(exported / "model")): path for path in (exported / "model").rglob("*") if path.is_file()
    }
    assert {name: data for name, data in there[1].items() if name != ".gitattributes"} == {
        name: path.read_bytes() for name, path in own.items()
    }
    model = load_model(f"hf://{OWNER}/trial")
    assert model.weights_sha256 == load_model(exported / "model").weights_sha256
    flow = str(exported / "theirs/data/test/calm.hdf5")
    for place, output in ((f"hf://{OWNER}/trial", "theirs.hdf5"), (str(exported / "model"), "ours.hdf5")):
        command = ["predict", "--checkpoint", place, "--input", flow, "--steps", "1", "--no-paraview"]
        assert main([*command, "--output", str(tmp_path / output)]) == 0
    # The cache answers: no file is transferred again (the empty .gitattributes never is).
    assert sum(f"GET /{OWNER}/trial/resolve" in one for one in hub.requests) == len(own)


def test_a_revision_keeps_its_weights(exported: Path, hub: Hub, tmp_path: Path) -> None:
    assert push(exported / "model", f"{OWNER}/trial") == 0
    other = tmp_path / "other"
    export(make_run(tmp_path, seed=4), other)
    assert push(other, f"{OWNER}/trial", "--revision", "wide") == 0
    assert push(other, f"{OWNER}/trial", "--revision", "wide") == 0  # a second commit to the same branch
    hashes = {
        revision: load_model(f"hf://{OWNER}/trial{revision}").weights_sha256 for revision in ("", "@main", "@wide")
    }
    assert hashes[""] == hashes["@main"] != hashes["@wide"]
    sha = hub.repositories[f"{OWNER}/trial"].branches["wide"]
    assert load_model(f"hf://{OWNER}/trial@{sha}").weights_sha256 == hashes["@wide"]


def test_a_private_model_needs_the_token(exported: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    assert push(exported / "model", f"{OWNER}/secret", "--private") == 0
    assert hub.repositories[f"{OWNER}/secret"].private
    assert load_model(f"hf://{OWNER}/secret").step == 7
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE + "2")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="does not exist, or it is private"):
        load_model(f"hf://{OWNER}/secret")


def test_what_the_hub_does_not_do_is_one_line(
    exported: Path, hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, flow = str(exported / "model"), str(exported / "theirs/data/test/calm.hdf5")

    def load(place: str, says: str) -> None:
        command = f"predict --checkpoint {place} --input {flow} --steps 1 --output {tmp_path / 'x.hdf5'}".split()
        refused(capfd, *command, says=(says,))

    load(f"hf://{OWNER}/nothing", f"hf://{OWNER}/nothing does not exist, or it is private")
    refused(capfd, "checkpoint", "push", model, "others/trial", says=("refuses hf://others/trial (403)",))
    refused(capfd, "checkpoint", "push", model, "trial", says=("trial is not the name of a repository",))
    refused(capfd, "checkpoint", "push", str(exported / "runs/trained"), "a/b", says=("is no exported model",))
    assert push(exported / "model", f"{OWNER}/trial") == 0
    load(f"hf://{OWNER}/trial@v9", "has no branch, tag or commit v9")
    hub.status = 403
    load(f"hf://{OWNER}/trial", "(403)")
    hub.status = 0
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(capfd, "checkpoint", "push", model, f"{OWNER}/new", says=("the token in HF_TOKEN",))
    monkeypatch.delenv("HF_TOKEN")
    refused(capfd, "checkpoint", "push", model, f"{OWNER}/new", says=("without a token: set HF_TOKEN",))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    load(f"hf://{OWNER}/fresh", "did not answer")


def test_a_damaged_model_is_not_uploaded(
    exported: Path, hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(exported / "model", tmp_path / "model")
    (model / "config.yaml").write_text("name: other")
    refused(capfd, "checkpoint", "push", str(model), f"{OWNER}/trial", says=("config.yaml is damaged",))
    assert hub.requests == []


def test_a_process_of_its_own_loads_from_the_hub(exported: Path, hub: Hub, tmp_path: Path) -> None:
    """With the library's environment variables, as a user sets them."""
    assert push(exported / "model", f"{OWNER}/trial") == 0
    code = f"import shodh_moe; print(shodh_moe.load_model('hf://{OWNER}/trial').step)"
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "7\n", done.stderr


def test_the_card_is_what_the_hub_reads(exported: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard((exported / "model/README.md").read_text())
    assert card.data.library_name == "shodh_moe"
    assert card.data.license == "unknown"  # the data are not ours
    assert "mixture-of-experts" in (card.data.tags or [])
    found = json.loads((exported / "model/config.json").read_text())
    assert (found["library_name"], found["grid"], found["history"]) == ("shodh_moe", [16, 8, 24], 2)
    assert torch.zeros(found["latent_channels"]).shape == (16,)
