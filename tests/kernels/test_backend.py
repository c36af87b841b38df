"""The choice between Triton and the reference, and recorded launches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shodh_moe import config
from shodh_moe.kernels import backend, cosine_gating, gating, topk_gating
from tests.kernels.forms import DEVICE, form

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


def test_the_automatic_choice_is_triton_only_on_a_gpu():
    with form("auto"):
        assert not backend.use_triton(torch.zeros(1))
        assert backend.describe(torch.device("cpu")) == "compiled CPU passes, torch reference"
        assert backend.use_triton(torch.zeros(1, device=DEVICE)) == (DEVICE.type == "cuda")


def test_a_forced_choice_appears_in_the_log_line():
    with form("reference"):
        assert not backend.use_triton(torch.zeros(1, device=DEVICE))
        assert backend.describe(DEVICE) == "torch reference (SHODH_KERNELS=reference)"
    with form("triton"):
        assert backend.use_triton(torch.zeros(1, device=DEVICE))
        assert backend.describe(DEVICE).startswith("triton 3.")
        assert backend.describe(DEVICE).endswith("(SHODH_KERNELS=triton)")


def test_unknown_choice_raises():
    with (
        form("cuda"),
        pytest.raises(ValueError, match="SHODH_KERNELS is 'cuda': set it to one of auto, reference, triton"),
    ):
        topk_gating(torch.zeros(1, 2), 1)


def _shodh(kernels: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"SHODH_KERNELS": kernels}
    return subprocess.run(
        [sys.executable, "-m", "shodh_moe.cli", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("kernels", "message"), [("fast", "SHODH_KERNELS is 'fast'"), ("triton", "to a GPU, or set")])
def test_commands_refuse_an_impossible_choice(kernels, message, tmp_path):
    if kernels == "triton" and DEVICE.type == "cuda":
        pytest.skip("Triton runs on this machine")
    result = _shodh(kernels, "run", "--config", str(CONFIG), f"runs={tmp_path}")
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_config_enforces_the_limits_of_the_kernels():
    assert config.MAX_EXPERTS == gating.MAX_EXPERTS
    assert config.MAX_CHOICES == gating.MAX_CHOICES
    assert config.MAX_ROUTING_WIDTH == cosine_gating.MAX_ROUTING_WIDTH


def test_recorded_launches_do_not_run():
    from shodh_moe.kernels import gating_triton

    with backend.record() as launches:
        gating_triton.forward(torch.empty(100, 4, device="meta"), 30, "position", None)
    assert len(launches) == 2  # documented in the module
    with backend.record() as launches:
        gating_triton.forward(torch.empty(100, 4, device="meta"), 30, "probability", None)
    assert len(launches) == 8
    assert not backend.recording()


def test_tuned_settings_are_those_of_the_device(monkeypatch):
    table = {"cpu": {"gating": {"E4": {"BLOCK_N": 64}}}}
    monkeypatch.setattr(backend, "_table", lambda: table)
    default = {"BLOCK_N": 16, "num_warps": 4}
    assert backend.settings("gating", "E4", default, torch.device("cpu")) == {"BLOCK_N": 64, "num_warps": 4}
    assert backend.settings("gating", "E8", default, torch.device("cpu")) == default
