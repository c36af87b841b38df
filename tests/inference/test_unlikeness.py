"""The warning of inputs that are unlike the training data, and the contexts that it comes from."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import pytest
import torch

from shodh_moe.cli import main
from shodh_moe.config.paths import resolve_paths
from shodh_moe.data import read_provenance
from shodh_moe.inference import load_model
from shodh_moe.inference.contexts import FILE, Contexts, collect, context_rows, join, load, router_features, save
from shodh_moe.inference.loading import find_source
from shodh_moe.inference.unlikeness import fit_unlikeness
from shodh_moe.tokenizer.latents import LatentSamples, load_latents
from tests.tiny import write_dataset
from tests.trained import GRID, HISTORY, SNAPSHOTS, make_run, push

PATHS = {"moe": {"expert_hidden": 16, "scope": "path", "num_experts": 2}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unlike")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        push(write_dataset(folder / "theirs", GRID, SNAPSHOTS), {"calm": 4.0, "wild": 8.0})
        run = make_run(folder, PATHS, start=True)
        assert main(["checkpoint", "export", str(run), "--output", "model"]) == 0
    return folder


def random_contexts(domains: int = 2, count: int = 200, width: int = 12) -> Contexts:
    random = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(domains, width, generator=random)
    domain_M = torch.arange(domains).repeat_interleave(count)
    rows = centres[domain_M] + torch.randn(domains * count, width, generator=random)
    valid = torch.arange(domains * count) % 4 == 0
    return Contexts(rows, domain_M, valid, [f"d{n}" for n in range(domains)], width // 2)


def test_about_one_in_a_hundred_samples_of_the_training_domains_is_unlike_them() -> None:
    contexts = random_contexts(count=4000)
    fitted = fit_unlikeness(contexts)
    score_M, nearest_M = fitted.score(contexts.rows_MF[contexts.valid_M])
    assert 0.005 < float((score_M > 1).double().mean()) < 0.03
    assert torch.equal(nearest_M, contexts.domain_M[contexts.valid_M])


def test_another_place_and_another_size_are_both_noticed() -> None:
    contexts = random_contexts()
    fitted = fit_unlikeness(contexts)
    strange = 5 * torch.randn(1, 12, generator=torch.Generator().manual_seed(9))
    faster = contexts.rows_MF[contexts.domain_M == 0].mean(0, keepdim=True) * 4
    for rows in (strange, faster):
        assert float(fitted.score(rows)[0]) > 1


def test_contexts_are_what_the_router_sees(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    source, models = find_source(Path("model")), load_model("model")
    samples = LatentSamples(load_latents(resolve_paths(source.config).latents, "train"), HISTORY)
    contexts = load(made / "model" / FILE)
    batch = samples.batch([(0, n) for n in range(samples.sizes[0])])
    z_BSI = models.transformer.embedding_inputs(batch.history_BHCxyz, batch.geometry_BCxyz)
    rows = contexts.rows_MF[(contexts.domain_M == 0) & ~contexts.valid_M]
    torch.testing.assert_close(context_rows(z_BSI, HISTORY), rows, rtol=1e-5, atol=1e-6)
    assert models.transformer.path is not None
    seen, _ = models.transformer.path.features(z_BSI, (2, 1, 3))
    torch.testing.assert_close(router_features(rows, contexts.inputs), seen, rtol=1e-5, atol=1e-6)
    change = (batch.history_BHCxyz[:, 1] - batch.history_BHCxyz[:, 0]).flatten(2)
    torch.testing.assert_close(rows[:, 2 * contexts.inputs :][:, :16], change.mean(2), rtol=1e-4, atol=1e-5)
    # The run itself has the same contexts, from its latents.
    own = collect(resolve_paths(source.config).latents, source.config.model)
    assert torch.equal(own.rows_MF, contexts.rows_MF)
    weighted = collect(resolve_paths(source.config).latents, source.config.model, weights={"calm": 0.0})
    assert weighted.domains == ["wild"]


def test_contexts_survive_a_file_and_join(tmp_path: Path) -> None:
    contexts = random_contexts()
    save(contexts, tmp_path / FILE)
    again = load(tmp_path / FILE)
    assert torch.equal(again.rows_MF, contexts.rows_MF)
    assert torch.equal(again.valid_M, contexts.valid_M)
    assert (again.domains, again.inputs) == (contexts.domains, contexts.inputs)
    both, apart = join(contexts, again), join(contexts, again, apart=True)
    assert both.domains == ["d0", "d1"]
    assert apart.domains == ["d0", "d1", "d0+", "d1+"]
    assert apart.domain_M.bincount().tolist() == [200] * 4


def test_predict_warns_of_a_flow_unlike_all_training_domains(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = {}
    for name, speed in (("usual", 0.0), ("backwards", -12.0)):
        shutil.copyfile(made / "theirs/data/train/calm.hdf5", f"{name}.hdf5")
        with h5py.File(f"{name}.hdf5", "r+") as file:
            file["t1_fields/velocity"][..., 0] += speed
        words = ["--input", f"{name}.hdf5", "--steps", "1", "--output", f"{name}_out.hdf5", "--no-paraview"]
        assert main(["predict", "--checkpoint", str(made / "model"), *words]) == 0
        found[name] = capfd.readouterr().err, read_provenance(Path(f"{name}_out.hdf5"))
    error, provenance = found["backwards"]
    assert "warning: trajectory 0 of backwards.hdf5 is unlike all training data of" in error
    assert "times the limit; the nearest domain is calm): expect larger errors" in error
    (score,) = provenance["unlikeness"]
    assert score > 1
    error, provenance = found["usual"]
    assert "unlike" not in error
    assert provenance["unlikeness"][0] < score / 2
    assert provenance["nearest_domain"] == ["calm"]


def test_predict_warns_of_a_field_that_the_model_does_not_see(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(made / "theirs/data/train/calm.hdf5", "warm.hdf5")
    with h5py.File("warm.hdf5", "r+") as file:
        made_field = file["t0_fields"].create_dataset("temperature", data=file["t0_fields/pressure"][()])
        made_field.attrs.update(dict(file["t0_fields/pressure"].attrs))
    words = ["--input", "warm.hdf5", "--steps", "1", "--output", "out.hdf5", "--no-paraview"]
    assert main(["predict", "--checkpoint", str(made / "model"), *words]) == 0
    assert "warm.hdf5 has the field temperature, which the model does not have and leaves out" in capfd.readouterr().err


def test_an_export_without_latents_says_what_it_lacks(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A damaged latent file does not stop an export either."""
    monkeypatch.chdir(made)
    run = find_source(made / "runs/trained")
    file = run.paths.latents / "train.hdf5"
    whole = file.read_bytes()
    try:
        for name, content in (("damaged", b"damaged"), ("missing", None)):
            file.unlink() if content is None else file.write_bytes(content)
            output = tmp_path / name
            assert main(["checkpoint", "export", str(run.path), "--output", str(output)]) == 0
            assert "so the export cannot tell whether an input is unlike them" in capfd.readouterr().err
            assert not (output / FILE).exists()
            words = [
                "--input",
                "theirs/data/test/calm.hdf5",
                "--steps",
                "1",
                "--output",
                str(tmp_path / f"{name}.hdf5"),
            ]
            assert main(["predict", "--checkpoint", str(output), *words, "--no-paraview"]) == 0
            assert "records no contexts of its training data" in capfd.readouterr().err
    finally:
        file.write_bytes(whole)
