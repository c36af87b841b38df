"""Fine-tuning of a small exported model: what learns, what stays, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from shodh_moe.base.errors import UserError
from shodh_moe.checkpoint import CheckpointReader
from shodh_moe.cli import main
from shodh_moe.config import Config
from shodh_moe.config.paths import resolve_paths
from shodh_moe.inference import Model, load_model
from shodh_moe.inference.contexts import FILE, load
from shodh_moe.inference.export import write_export
from shodh_moe.inference.loading import find_source, verify_export, weights_sha256
from shodh_moe.inference.one_step import predict_windows
from shodh_moe.runs import pipeline
from shodh_moe.tokenizer.latents import LatentSamples, load_latents
from tests.tiny import LAYER, refused, tree, write_dataset
from tests.trained import GRID, SNAPSHOTS, make_run, push
from tests.training.launch import launch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"
DENSE = {"moe": {"num_experts": 0, "shared_experts": 1, "expert_hidden": 16}}
# With a bias of the router, which has to stay where the router does not learn.
PATHS = {"moe": {"expert_hidden": 16, "num_experts": 2, "router": {"balance": "bias"}}}
SHORT = ("parallel.processes=1", "training.steps=3", "training.warmup_steps=1", "training.log_every=1")
SHORT += ("training.learning_rate=0.01",)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the exported model ``model``, its run, and the dataset ``mine`` of another domain."""
    folder = tmp_path_factory.mktemp("finetune")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        push(write_dataset(folder / "theirs", GRID, SNAPSHOTS), {"calm": 0.0, "wild": 8.0})
        run = make_run(folder, PATHS, start=True)
        assert main(["checkpoint", "export", str(run), "--output", "model"]) == 0
        push(write_dataset(folder / "mine", GRID, SNAPSHOTS, ("other",)), {"other": -8.0})
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test runs in a folder of its own, beside links to ``model`` and ``mine``, with ranks that start fast."""
    monkeypatch.chdir(tmp_path)

    def ranks(config: Config, run: Path, resume: str, module: str, finished: Callable[[], bool]) -> int:
        done = launch(int(config.parallel.processes), SCRIPT, "--config", str(run / "config.yaml"), "--resume", resume)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.returncode

    monkeypatch.setattr(pipeline, "launch_ranks", ranks)
    return tmp_path


def tune(made: Path, train: str, *more: str, model: str = "model", data: str = "mine", output: str = "tuned") -> Path:
    words = ["--model", str(made / model), "--data", str(made / data), "--output", output, "--train", train]
    assert main(["finetune", *words, *SHORT, *more]) == 0
    return Path(output)


def predictions(model: Model, latents: Path, split: str) -> tuple[Tensor, Tensor]:
    """One-step predictions of all samples, and the paths of their tokens."""
    samples = LatentSamples(load_latents(latents, split), model.history)
    windows = [(domain, n) for domain, size in enumerate(samples.sizes) for n in range(size)]
    found = list(predict_windows(model.transformer, samples, windows, 2))
    return torch.cat([one.latent_BCxyz for one in found]), torch.cat([one.routing[0].expert_N for one in found])


def latents_of(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        return folder / resolve_paths(find_source(model).config).latents


def weights(model: Model) -> dict[str, Tensor]:
    return model.transformer.state_dict()


def test_a_new_path_leaves_the_known_domains_alone(
    made: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tune(made, "expert")
    said = capsys.readouterr().out
    assert "path 2 starts as a copy of path" in said
    assert "it takes 100% of the validation samples of other and none of the" in said
    before, after = load_model(made / "model"), load_model(tuned)
    moe = after.transformer.config.moe
    assert (moe.num_experts, moe.router.added) == (3, [2])
    # All samples take the new path, so none may be dropped and nothing may push them to other paths.
    assert (moe.dropless, moe.router.balance_weight, moe.router.z_weight) == (True, 0, 0)
    old = latents_of(made / "model", made, monkeypatch)
    for split in ("train", "valid", "test"):
        (z_a, path_a), (z_b, path_b) = (predictions(models, old, split) for models in (before, after))
        assert torch.equal(path_a, path_b)
        assert set(path_a.tolist()) == {0, 1}
        assert torch.equal(z_a, z_b)
    new = latents_of(tuned, here, monkeypatch)
    (z_a, path_a), (z_b, path_b) = (predictions(models, new, "test") for models in (before, after))
    assert set(path_b.tolist()) == {2}
    assert float((z_a - z_b).abs().max()) > 1e-3
    # Every weight of the model before is in the one after, and the new path has learned.
    ours = weights(after)
    for name, tensor in weights(before).items():
        found = ours[name.replace("path.router.", "path.router.base.")]
        assert torch.equal(found[: len(tensor)], tensor), name
    copied = int(path_a.mode().values)
    for name in ("embed.routed_EIO", "head.routed_EIO", "blocks.0.moe.experts.down_LFD"):
        assert not torch.equal(ours[name][2], ours[name][copied]), name


def test_a_grown_model_grows_again(
    made: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second new path keeps away from the first one's domain too; the same name does not confuse them."""
    first = tune(made, "expert")
    assert load(first / FILE).domains == ["calm", "wild", "other"]
    push(write_dataset(here / "far", GRID, SNAPSHOTS, ("other",)), {"other": 30.0})
    # Two ranks share the four experts, and one of them holds none that learns.
    second = tune(here, "expert", "parallel.processes=2", model="tuned", data="far", output="twice")
    assert load(second / FILE).domains == ["calm", "wild", "other", "other+"]
    models = [load_model(path) for path in (made / "model", first, second)]
    assert models[2].transformer.config.moe.router.added == [2, 3]
    old = latents_of(made / "model", made, monkeypatch)
    assert torch.equal(predictions(models[0], old, "valid")[0], predictions(models[2], old, "valid")[0])
    middle = latents_of(first, here, monkeypatch)
    (z_a, path_a), (z_b, path_b) = (predictions(one, middle, "test") for one in models[1:])
    assert torch.equal(z_a, z_b)
    assert set(path_a.tolist()) == set(path_b.tolist()) == {2}
    assert set(predictions(models[2], latents_of(second, here, monkeypatch), "test")[1].tolist()) == {3}


def test_the_path_of_the_data_learns_alone(made: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push(write_dataset(here / "calmer", GRID, SNAPSHOTS, ("calm",)), {"calm": 0.0})
    tuned = tune(made, "paths", data=str(here / "calmer"))
    before, after = load_model(made / "model"), load_model(tuned)
    old, new = latents_of(made / "model", made, monkeypatch), latents_of(tuned, here, monkeypatch)
    (path,) = set(predictions(after, new, "train")[1].tolist())
    (z_a, path_a), (z_b, path_b) = (predictions(one, old, "test") for one in (before, after))
    assert torch.equal(path_a, path_b)
    own = (path_a.view(len(z_a), -1) == path).all(1)
    assert own.any()
    assert (~own).any()
    assert torch.equal(z_a[~own], z_b[~own])
    assert all(not torch.equal(one, other) for one, other in zip(z_a[own], z_b[own], strict=True))
    ours = weights(after)
    moved = {name for name, tensor in weights(before).items() if not torch.equal(tensor, ours[name])}
    assert "embed.routed_EIO" in moved
    assert "path.router.bias_E" not in moved
    assert load(tuned / FILE).domains == ["calm", "wild"]  # both are still known


def test_low_rank_additions_are_in_the_exported_weights(made: Path, here: Path) -> None:
    tuned = tune(made, "lora", "finetune.rank=2")
    before, after = weights(load_model(made / "model")), weights(load_model(tuned))
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert "blocks.1.attention.qkv.weight" in moved
    assert "blocks.0.moe.experts.gate_up_LDF" in moved
    for name, tensor in before.items():
        if tensor.dim() < 2 or ".router." in name:
            assert name not in moved
        for change in (after[name] - tensor).view(-1, *tensor.shape[-2:]) if name in moved else ():
            assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) <= 2, name
    state = CheckpointReader(here / "runs/tuned/checkpoints/3").state["tensors"]
    assert state["model/embed.parametrizations.weight.0.up"]["shape"] == [24, 2]
    held = "exp_avg/embed.parametrizations.weight.original"
    assert not CheckpointReader(here / "runs/tuned/checkpoints/3").tensor(held).any()
    # The additions start at zero, so the run starts with the model's outputs.
    start = load_model(here / "runs/tuned/start", made / "model/tokenizer")
    assert start.weights_sha256 == load_model(made / "model").weights_sha256


def test_all_weights_learn_and_the_tokenizer_stays(
    made: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = tune(made, "all", "training.steps=2")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[finetune]")]
    assert lines[0].startswith("[finetune] other, latent MSE one step ahead on validation data: ")
    assert lines[-1] == "[finetune] tuned"
    assert verify_export(tuned) == []
    for name in ("tokenizer.safetensors", "tokenizer.json"):
        assert (tuned / "tokenizer" / name).read_bytes() == (made / "model" / "tokenizer" / name).read_bytes()
    before, after = weights(load_model(made / "model")), weights(load_model(tuned))
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert not [name for name in still if "path.router" not in name], still
    assert load(tuned / FILE).domains == ["other"]
    # The result is a model like the first one: `finetune` and `predict` take it.
    again = tune(here, "router", model="tuned", data=str(made / "mine"), output="again")
    flow = made / "mine/data/test/other.hdf5"
    words = ["--input", str(flow), "--steps", "1", "--output", "out.hdf5", "--no-paraview"]
    assert main(["predict", "--checkpoint", str(again), *words]) == 0
    ours, theirs = weights(load_model(again)), weights(load_model(tuned))
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} <= {
        name for name in ours if ".router." in name
    }


def test_the_same_command_reuses_its_run_and_refuses_another_model(
    made: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "model", "model")
    words = ["finetune", "--model", "model", "--data", str(made / "mine"), "--output", "tuned", *SHORT]
    assert main([*words, "--train", "expert"]) == 0
    before = tree(here / "runs")
    Path("tuned").rename("first")
    assert main([*words, "--train", "expert"]) == 0
    assert tree(here / "runs") == before
    (a, b) = (weights(load_model(path)) for path in ("first", "tuned"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    shutil.rmtree("tuned")
    refused(capfd, *words, "--train", "all", says=("belongs to another config", "finetune.train (expert there"))
    other = here / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    push(write_dataset(Path("theirs").absolute(), GRID, SNAPSHOTS), {"calm": 0.0, "wild": 8.0})
    assert main(["checkpoint", "export", str(make_run(other, PATHS, seed=4, start=True)), "--output", "model"]) == 0
    monkeypatch.chdir(here)
    shutil.rmtree("model")
    (other / "model").rename("model")
    capfd.readouterr()
    assert main([*words, "--train", "expert"]) == 2  # after encoding with the other tokenizer's description
    assert "runs/tuned was started from another model than model: give another --output" in capfd.readouterr().err


def test_branches_join_into_a_mixture_whose_router_learns_afterwards(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Branch, train, join: exported models are merged, and the result is fine-tuned and exported again."""
    push(write_dataset(here / "theirs", GRID, SNAPSHOTS), {"calm": 0.0, "wild": 8.0})
    run = make_run(here, DENSE)
    assert main(["tokenizer", "encode", "--config", str(run / "config.yaml")]) == 0
    assert main(["checkpoint", "export", str(run), "--output", "anchor"]) == 0
    source = find_source(Path("anchor"))
    for name in ("calm", "wild"):
        branch = load_model("anchor")
        for parameter in branch.transformer.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape)
        branch.weights_sha256 = weights_sha256(weights(branch))
        write_export(Path(name), source, branch, None)
    models = [{"model": name, "domain": name} for name in ("calm", "wild")]
    Path("mixture.yaml").write_text(yaml.safe_dump({"base_model": "anchor", "models": models, "output": "mixed"}))
    assert main(["merge", "mixture", "mixture.yaml"]) == 0
    assert find_source(Path("mixed")).config.tokenizer.path == "calm/tokenizer"
    tuned = tune(here, "router", model="mixed", data="theirs")
    before, after = load_model("mixed"), load_model(tuned)
    assert after.transformer.config.moe.num_experts == 2
    ours, theirs = weights(after), weights(before)
    moved = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert moved
    assert all(name.startswith("path.router.") for name in moved)
    latents = latents_of(tuned, here, monkeypatch)
    assert set(predictions(after, latents, "test")[1].tolist()) == {0, 1}


def add_field(dataset: Path) -> None:
    for path in dataset.glob("data/*/*.hdf5"):
        with h5py.File(path, "r+") as file:
            source = file["t0_fields/pressure"]
            made = file["t0_fields"].create_dataset("temperature", data=np.asarray(source))
            made.attrs.update(dict(source.attrs))


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--model", "nowhere"], ("no folder nowhere",)),
        (["--data", "nowhere"], ("data.path: there is no folder nowhere",)),
        (["training.stepz=3"], ("training.stepz", "training.steps")),
        (["model.dim=48"], ("model.dim belongs to", "cannot change")),
        (["data.path=x"], ("data.path follows from --model, --data and --output",)),
        (["finetune.train=some"], ("finetune.train", "'all', 'expert', 'paths', 'lora' or 'router'")),
        (["--output", "taken"], ("taken exists",)),
        (["--config", "absent.yaml"], ("absent.yaml",)),
    ],
)
def test_wrong_words_are_refused_in_one_line(
    words: list[str], messages: tuple[str, ...], made: Path, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "taken").mkdir()
    before = tree(here)
    given = ["--model", str(made / "model"), "--data", str(made / "mine"), "--output", "tuned"]
    refused(capfd, "finetune", *given, *words, says=messages)
    assert tree(here) == before


def test_a_model_is_tuned_on_another_grid(made: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its contexts, from which a new path must keep away, are means over a grid of any size."""
    push(write_dataset(here / "wide", (24, 16, 8), SNAPSHOTS, ("other",)), {"other": -8.0})
    tuned = tune(here, "expert", model=str(made / "model"), data="wide")
    assert find_source(tuned).config.data.grid == [24, 16, 8]
    before, after = load_model(made / "model"), load_model(tuned)
    assert before.grid == after.grid == list(GRID)  # that of the tokenizer
    new, old = latents_of(tuned, here, monkeypatch), latents_of(made / "model", made, monkeypatch)
    (z_a, _), (z_b, path_b) = (predictions(model, new, "test") for model in (before, after))
    assert z_b.shape[2:] == (3, 2, 1)
    assert set(path_b.tolist()) == {2}
    assert float((z_a - z_b).abs().max()) > 1e-3
    assert torch.equal(*(predictions(model, old, "test")[0] for model in (before, after)))


def test_data_of_a_size_that_the_model_does_not_take_are_refused(
    made: Path, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_dataset(here / "odd", (20, 16, 8), SNAPSHOTS, ("other",))
    words = ["finetune", "--model", str(made / "model"), "--data", "odd", "--output", "tuned", *SHORT]
    says = ("odd has grid [20, 16, 8], not a multiple of 8", "nearest sizes are [16, 16, 8] and [24, 16, 8]")
    refused(capfd, *words, says=says)
    assert not (here / "runs").exists()


def test_a_field_that_the_model_lacks_is_refused_unless_it_is_left_out(
    made: Path, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(here / "warm", GRID, SNAPSHOTS, ("other",))
    add_field(data)
    words = ["finetune", "--model", str(made / "model"), "--data", str(data), "--output", "tuned", *SHORT]
    says = ("has the field temperature, which", "velocity, pressure, solid", "finetune.ignore_fields=[temperature]")
    refused(capfd, *words, says=says)
    assert main([*words, "finetune.ignore_fields=[temperature]"]) == 0


def test_data_that_look_like_a_known_domain_get_no_path(
    made: Path, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["finetune", "--model", str(made / "model"), "--output", "tuned", "--train", "expert", *SHORT]
    says = ("because they look like those of wild", "use --train all or lora")
    push(write_dataset(here / "same", GRID, SNAPSHOTS, ("wild",)), {"wild": 8.0})
    assert main([*words, "--data", "same"]) == 2  # after encoding
    error = capfd.readouterr().err.splitlines()[-1]
    assert all(text in error for text in says), error
    assert not (here / "runs").exists()
    assert main([*words, "--data", str(made / "theirs")]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "has the domains calm, wild: --train expert adds one path for one domain" in error


def test_a_grown_model_exchanges_no_samples(made: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(made / "model"), "--data", str(made / "mine"), "--output", "tuned", "--train", "expert"]
    assert main(["finetune", *words, *SHORT, "parallel.exchange=sample"]) == 2  # after encoding
    error = capfd.readouterr().err.splitlines()[-1]
    assert "parallel.exchange sample needs one path for each sample, but fine-tuning has added experts" in error
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("model", "train", "messages"),
    [
        (DENSE, "expert", ("is dense", "shodh merge upcycle")),
        (DENSE, "router", ("has no router",)),
        (DENSE, "paths", ("finetune.train paths needs a model with paths",)),
        ({"moe": {**LAYER, "expert_hidden": 16}}, "expert", ("has scope layer", "--train all or lora")),
        ({"moe": {"top_k": 2, "expert_hidden": 16}}, "expert", ("top_k 2", "--train all or lora")),
    ],
)
def test_models_without_paths_get_no_further_one(
    model: dict[str, Any], train: str, messages: tuple[str, ...], here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run(here, model)
    words = ["--model", str(run), "--data", "theirs", "--output", "tuned", "--train", train]
    refused(capfd, "finetune", *words, *SHORT, says=messages)


def test_without_recorded_contexts_no_path_is_added(made: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_export(Path("bare"), find_source(made / "model"), load_model(made / "model"), None)
    words = ["--model", "bare", "--data", str(made / "mine"), "--output", "tuned", "--train", "expert"]
    refused(capfd, "finetune", *words, *SHORT, says=("bare records no contexts", "export it again"))


def test_damaged_contexts_are_noticed(made: Path, here: Path) -> None:
    described = json.loads((made / "model/export.json").read_text())
    assert FILE in described["sha256"]
    known = load(made / "model" / FILE)
    assert known.domains == ["calm", "wild"]
    shutil.copytree(made / "model", here / "model")
    (here / "model" / FILE).write_bytes(b"x")
    with pytest.raises(UserError, match=r"contexts\.safetensors is damaged"):
        find_source(here / "model")
