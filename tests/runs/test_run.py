"""A run from Python: its records as tables, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.runs.run import Run, open_run
from tests.trained import make_run


def layer(number: int, step: int) -> dict[str, Any]:
    """A layer's routing record with numbers that tell step, layer, domain and expert."""
    by_domain = {"wild": 0.02 * step + number, "calm": 0.01 * step + number}
    return {
        "layer": number,
        "load": {name: [value, 1 - value, value / 2] for name, value in by_domain.items()},
        "load_all": [0.5, 0.25, 0.25],
        **dict.fromkeys(("dropped_fraction", "entropy", "mean_gate"), by_domain),
        "largest_logit": 1.0,
    }


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with records of three steps, of which the second has no routing and the last is there twice."""
    folder = make_run(tmp_path)
    train = [
        {"kind": "train", "step": 10, "loss": 3.0, "grad_norm": None, "routing": [layer(0, 10), layer(1, 10)]},
        {"kind": "train", "step": 15, "loss": 2.0, "grad_norm": 0.5},
        {"kind": "train", "step": 20, "loss": 9.0, "grad_norm": 0.5, "routing": [layer(0, 9), layer(1, 9)]},
        {"kind": "train", "step": 20, "loss": 1.0, "grad_norm": 0.5, "routing": [layer(0, 20), layer(1, 20)]},
    ]
    valid = [{"kind": "valid", "step": 20, "latent_mse": {"calm": 0.1, "wild": 0.2}}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in train + valid))
    return open_run(folder)


def test_records_are_a_table(run: Run) -> None:
    table = run.records()
    assert table.index.name == "step"
    assert table.index.tolist() == [10, 15, 20]
    assert table.columns.tolist() == ["loss", "grad_norm"]
    assert table.loss.tolist() == [3.0, 2.0, 1.0]
    assert np.isnan(table.grad_norm[10])
    valid = run.records("valid")
    assert valid.to_dict("list") == {"latent_mse.calm": [0.1], "latent_mse.wild": [0.2]}


def test_routing_has_named_axes(run: Run) -> None:
    routing = run.routing()
    assert dict(routing.sizes) == {"step": 2, "layer": 2, "domain": 2, "expert": 3}
    at = routing.sel(step=20, layer=1, domain="wild")
    assert at["load"].values == pytest.approx([1.4, -0.4, 0.7])
    assert float(at.entropy) == pytest.approx(1.4)
    assert float(routing.mean_gate.sel(step=10, layer=0, domain="calm")) == pytest.approx(0.1)


def test_config_and_metrics(run: Run) -> None:
    assert run.config.name == "trained"
    assert run.checkpoint == run.folder / "checkpoints/7"
    assert len(run.dataset()) == 2
    with pytest.raises(UserError, match=r"metrics.json is missing: make it with `shodh evaluate`"):
        _ = run.metrics
    (run.folder / "metrics.json").write_text('{"step": 7}')
    assert run.metrics == {"step": 7}
    (run.folder / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"metrics.json is damaged"):
        _ = run.metrics


def test_refusals(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="choose train or valid"):
        run.records("test")
    with pytest.raises(UserError, match="there is no run folder"):
        open_run(tmp_path)
    shutil.rmtree(run.checkpoint)
    with pytest.raises(UserError, match="holds no checkpoint"):
        _ = run.checkpoint
    (run.folder / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": 1.0}\n')
    with pytest.raises(UserError, match="no records of routing"):
        run.routing()
    with pytest.raises(UserError, match="no records of kind valid"):
        run.records("valid")
    for name, read in (("pandas", run.records), ("xarray", run.routing)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=rf"needs? {name}: pip install 'shodh_moe\[analysis\]'"):
            read()
