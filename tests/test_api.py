"""The public interface: its names, what they need, and how long they take to import."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import get_type_hints

import pytest

import shodh_moe
from shodh_moe.inference.export import export
from tests.trained import make_run

ROOT = Path(__file__).resolve().parents[1]
# A name is never removed or renamed without a deprecation (docs/versions.md).
NAMES = [
    *("Config", "Dataset", "Fields", "Model", "Run", "Tokenizer", "UserError", "kernels", "load_config", "load_model"),
    *("load_tokenizer", "merge", "metrics", "open_dataset", "open_run", "train"),
]
MEMBERS = {
    "Dataset": ["__getitem__", "__len__", "domains"],
    "Fields": ["channels", "to_xarray"],
    "Model": ["forecast", "grid", "history", "operator"],
    "Run": ["checkpoint", "dataset", "metrics", "paths", "records", "routing"],
    "Tokenizer": ["decode", "encode", "encode_geometry", "grid"],
    "kernels": [
        *("Gating", "combine", "cosine_topk_gating", "curl", "differentiation_matrix", "dispatch", "divergence"),
        *("divergence_adjoint", "expert_capacity", "topk_gating"),
    ],
    "metrics": [
        *("band_errors", "bifurcated", "conditional_mutual_information", "divergence_report", "energy_spectrum"),
        *("mutual_information", "nrmse", "purity", "sample_mse", "vrmse"),
    ],
}
SECONDS = 2.0
pytestmark = pytest.mark.timeout(300)


def test_no_name_has_vanished() -> None:
    assert shodh_moe.__all__ == NAMES
    assert set(NAMES) <= set(dir(shodh_moe))
    for name in NAMES:
        assert inspect.getdoc(getattr(shodh_moe, name)), name
    with pytest.raises(AttributeError, match="no attribute 'open_datasets'"):
        _ = shodh_moe.open_datasets  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", MEMBERS)
def test_no_member_has_vanished(name: str) -> None:
    there = getattr(shodh_moe, name)
    if isinstance(there, ModuleType):
        assert there.__all__ == MEMBERS[name]
    if name == "Tokenizer":
        there = there(shodh_moe.Config().tokenizer, [8, 8, 8])  # grid is an attribute of an instance
    assert [member for member in MEMBERS[name] if not hasattr(there, member)] == []


@pytest.mark.parametrize("name", NAMES)
def test_functions_are_typed(name: str) -> None:
    there = getattr(shodh_moe, name)
    if inspect.isfunction(there):
        hints = get_type_hints(there)
        assert hints.keys() == inspect.signature(there).parameters.keys() | {"return"}


def test_types_are_shipped() -> None:
    assert (Path(shodh_moe.__file__).parent / "py.typed").exists()


def test_every_name_is_documented() -> None:
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if not re.search(rf"`(?:shodh_moe\.)?{name}\b", page)] == []


def test_import_takes_less_than_two_seconds() -> None:
    """Processor time, since the machine may be busy; and no library that is slow to load."""
    code = "import sys, time, shodh_moe; print(time.process_time(), 'torch' in sys.modules, 'numpy' in sys.modules)"
    seconds, *heavy = _python(code).split()
    assert float(seconds) < SECONDS
    assert heavy == ["False", "False"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, its dataset, and the run's exported model."""
    folder = tmp_path_factory.mktemp("api")
    export(make_run(folder), folder / "model")
    return folder


def test_data_and_models_take_less_than_two_seconds_and_no_deepspeed(folder: Path) -> None:
    """All names, a dataset, a tokenizer, a model and a merge, in the processor time that comes on top of torch's."""
    code = f"""
import sys, time, torch
slow = ("numba", "scipy", "matplotlib", "tensorboard", "pandas", "xarray")
for name in ("deepspeed", *slow):
    sys.modules[name] = None  # an import of it fails
before = time.process_time()
import shodh_moe
for name in shodh_moe.__all__:
    getattr(shodh_moe, name)
folder = {str(folder)!r}
dataset = shodh_moe.open_dataset(folder + "/theirs", "test")
model = shodh_moe.load_model(folder + "/model")
latents = shodh_moe.load_tokenizer(folder + "/tok").encode(dataset[0].channels())
ready = time.process_time() - before
for name in slow:
    del sys.modules[name]
predicted = model.forecast(dataset[0], steps=2)
models = [folder + "/model/model.safetensors", folder + "/copy.safetensors"]
import shutil
shutil.copyfile(*models)
entries = [{{"model": one, "parameters": {{"weight": 0.5}}}} for one in models]
shodh_moe.merge({{"merge_method": "linear", "models": entries}}, folder + "/merged")
assert shodh_moe.open_run(folder + "/runs/trained").config.name == "trained"
print(ready, tuple(latents.shape), tuple(predicted["velocity"].shape))
"""
    ready, shapes = _python(code).splitlines()[-1].split(maxsplit=1)
    assert shapes == "(5, 16, 2, 1, 3) (2, 3, 16, 8, 24)"
    assert float(ready) < SECONDS


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
