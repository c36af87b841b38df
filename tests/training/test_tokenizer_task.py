"""Training the tokenizer with the common trainer: number of ranks, interruptions, and the files it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from safetensors.torch import load_file

from shodh_moe.base.errors import UserError
from shodh_moe.base.parameters import marks
from shodh_moe.config.load import load_config
from shodh_moe.config.paths import resolve_paths
from shodh_moe.data import list_trajectories
from shodh_moe.data.loader import Snapshots
from shodh_moe.runs.tokenizer_rank import main as train_rank
from shodh_moe.tokenizer import Tokenizer, load_tokenizer
from shodh_moe.tokenizer.reconstruction import Reconstruction
from shodh_moe.training import tokenizer_task as training
from shodh_moe.training.tokenizer_config import tokenizer_run
from shodh_moe.training.tokenizer_task import set_learning_rate_scales
from tests.tiny import CONFIG, config, tree, write_config, write_dataset
from tests.training.launch import launch

WORKER = Path(__file__).with_name("worker_tokenizer.py")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the trainings of worker_tokenizer.py: most by two ranks, one by a single rank."""
    folder = tmp_path_factory.mktemp("trained")
    write_config(folder)
    write_dataset(folder / "theirs")
    write_dataset(folder / "altered")
    for split in ("valid", "test"):
        for path in (folder / "altered/data" / split).iterdir():
            with h5py.File(path, "r+") as file:
                file["t1_fields/velocity"][...] = 100.0
                file["t0_fields/pressure"][...] = -100.0
    for ranks, names in ((2, ["whole", "broken", "asked", "direct", "high"]), (1, ["alone"])):
        done = launch(ranks, WORKER, str(folder), *names)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "tokenizer.safetensors")


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("step_ms", "tokens_per_second", "peak_memory_bytes")
    return [{key: line[key] for key in line if key not in times} for line in lines if line["kind"] == kind]


@pytest.mark.distributed
def test_training_writes_what_the_next_stages_need(trained: Path) -> None:
    whole = trained / "whole"
    assert load_tokenizer(whole).grid == [16, 16, 16]
    assert [record["step"] for record in records(whole, "train")] == [2, 3]
    assert [record["step"] for record in records(whole, "valid")] == [2, 3]
    for record in records(whole, "train"):
        assert record["loss"] == pytest.approx((3 * record["velocity_mse"] + record["pressure_mse"]) / 4)
    for name in ("velocity_mse", "pressure_mse"):
        assert set(records(whole, "valid")[0][name]) == {"calm", "wild"}
    assert [path.name for path in (whole / "checkpoints").glob("[0-9]*")] == ["3"]


@pytest.mark.distributed
def test_validation_uses_the_validation_split(trained: Path) -> None:
    tokenizer = load_tokenizer(trained / "whole")
    data = Snapshots(list_trajectories(trained / "theirs", "valid"))
    with torch.no_grad():
        errors = Reconstruction(tokenizer)(data.batch(data.of_domain(1)))
    stored = records(trained / "whole", "valid")[-1]
    assert errors.mean(1).tolist() == pytest.approx([stored[n]["wild"] for n in ("velocity_mse", "pressure_mse")], 1e-4)


@pytest.mark.distributed
def test_latents_of_the_training_split_have_mean_0_and_deviation_1(trained: Path) -> None:
    tokenizer, data = load_tokenizer(trained / "whole"), Snapshots(list_trajectories(trained / "theirs", "train"))
    with torch.no_grad():
        z = tokenizer.encode(data.batch(range(len(data)))).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(z.mean(1), torch.zeros(16).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(1, unbiased=False), torch.ones(16).double(), atol=1e-4, rtol=0)


@pytest.mark.distributed
def test_one_rank_trains_the_same_tokenizer_up_to_rounding(trained: Path) -> None:
    two, one = weights(trained / "whole"), weights(trained / "alone")
    assert two.keys() == one.keys()
    for name, tensor in two.items():
        torch.testing.assert_close(one[name], tensor, atol=2e-4, rtol=2e-3, msg=name)
    losses = [[record["loss"] for record in records(trained / name, "train")] for name in ("whole", "alone")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.distributed
def test_an_interruption_changes_no_bit_and_other_splits_no_statistic(trained: Path) -> None:
    whole, broken = weights(trained / "whole"), weights(trained / "broken")
    assert all(torch.equal(broken[name], whole[name]) for name in whole)
    assert records(trained / "broken", "train") == records(trained / "whole", "train")
    first, last = zip(*(records(trained / n, "valid") for n in ("whole", "broken")), strict=True)
    assert first[0] == first[1]
    assert last[0] != last[1], "the validation after the break is of other flows"


@pytest.mark.distributed
def test_an_interruption_after_the_last_step_only_repeats_the_statistics(trained: Path) -> None:
    whole, asked = weights(trained / "whole"), weights(trained / "asked")
    assert all(torch.equal(asked[name], whole[name]) for name in whole)
    assert records(trained / "asked", "train") == records(trained / "whole", "train")


@pytest.mark.distributed
def test_the_direct_decoder_with_a_penalty_in_bfloat16(trained: Path) -> None:
    for record in records(trained / "direct", "train"):
        parts = (3 * record["velocity_mse"] + record["pressure_mse"]) / 4 + 0.5 * record["divergence_mse"]
        assert record["loss"] == pytest.approx(parts)
        assert record["divergence_mse"] > 0
    assert weights(trained / "direct")["encoder.project.weight"].dtype == torch.float32


@pytest.mark.distributed
def test_a_loss_that_is_not_finite_names_the_key_and_the_snapshots(trained: Path) -> None:
    high = trained / "high"
    assert "lower tokenizer.learning_rate" in (high / "error.txt").read_text()
    report = json.loads((high / "nonfinite/2.json").read_text())
    samples = [part["samples"] for rank in report["ranks"] for part in rank["micro_batches"]]
    assert [len(part) for part in samples] == [2, 2]
    for sample in samples[0] + samples[1]:
        assert sample["file"] == f"{sample['domain']}.hdf5"
        assert 0 <= sample["first_snapshot"] < 5
        assert sample["finite"]
    assert not (high / "tokenizer.json").exists()


def test_ranks_do_not_change_a_trained_tokenizer(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    Tokenizer(config().tokenizer, [16, 16, 16]).save(
        resolve_paths(load_config("tiny.yaml", [f"data.path={dataset}"])).tokenizer
    )
    before = tree(tmp_path)
    assert train_rank(["--config", "tiny.yaml", f"data.path={dataset}"]) == 0
    assert "[tokenizer] unchanged" in capsys.readouterr().out
    assert tree(tmp_path) == before


def test_the_tokenizer_run_depends_only_on_tokenizer_settings() -> None:
    """Any run with the same tokenizer can then resume its training, and the ranks can read the config back."""
    run = tokenizer_run(config(), 2)
    others = config(name="other", runs="elsewhere", training={**CONFIG["training"], "learning_rate": 1.0, "steps": 9})
    assert tokenizer_run(others, 2) == run
    assert tokenizer_run(run, 2) == run
    assert resolve_paths(run).tokenizer == resolve_paths(config()).tokenizer
    assert (run.training.steps, run.training.batch_size, run.training.learning_rate) == (3, 2, 1e-3)


@pytest.mark.parametrize(
    ("settings", "same_tokenizer", "same_latents"),
    [
        ({"activation_checkpointing": True, "log_every": 1, "checkpoint_every": 1}, True, True),
        ({"latent_symmetries": "cube"}, True, False),
        ({"precision": "bfloat16"}, False, False),
        ({"operator": "spectral", "walls": "none"}, False, False),
        ({"decoder": "direct", "walls": "none", "divergence_weight": 0.1}, False, False),
        ({"patches": "apart", "refine": 0, "scales": "all"}, True, True),
        ({"patches": "overlapping"}, False, False),
        ({"refine": 8}, False, False),
        ({"scales": "sample"}, False, False),
    ],
)
def test_folder_names_change_only_with_settings_that_change_the_content(
    settings: dict[str, Any], same_tokenizer: bool, same_latents: bool
) -> None:
    one, other = resolve_paths(config()), resolve_paths(config(tokenizer={**CONFIG["tokenizer"], **settings}))
    assert (one.tokenizer == other.tokenizer) == same_tokenizer
    assert (one.latents == other.latents) == same_latents


def test_an_indivisible_batch_size_is_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"tokenizer\.batch_size 4 cannot be divided among 3 ranks"):
        tokenizer_run(config(), 3)


def test_a_damaged_initial_state_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "start.safetensors"
    start = {"velocity_rms": torch.ones(()), "geometry_mean_P": torch.ones(512)}
    assert not training._read_start(path, start)
    training._write_start(path, start)
    blank = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    assert training._read_start(path, blank)
    assert all(torch.equal(blank[name], tensor) for name, tensor in start.items())
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=rf"start.safetensors is damaged: delete {tmp_path} to train"):
        training._read_start(path, blank)


def test_a_few_steps_lower_the_error(dataset: Path) -> None:
    """The error is measured on the snapshots that the steps train on."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(config().tokenizer, [16, 16, 16])
    fields = Snapshots(list_trajectories(dataset, "train")).batch(range(4))
    tokenizer.velocity_rms.copy_(fields[:, :3].square().mean().sqrt())
    tokenizer.pressure_rms.copy_(fields[:, 3].square().mean().sqrt())
    set_learning_rate_scales(tokenizer)
    groups = [{"params": [p], "lr": 1e-3 * marks(p).lr_scale} for p in tokenizer.parameters()]
    optimizer = torch.optim.AdamW(groups)
    losses = []
    for _ in range(16):
        loss = Reconstruction(tokenizer)(fields).sum(0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
