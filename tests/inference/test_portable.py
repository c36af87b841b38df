"""Exported graphs: a process without this package gets our forecasts from them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shodh_moe
from shodh_moe.cli import main
from shodh_moe.inference.portable.parts import make_parts
from shodh_moe.inference.portable.velocity import MatrixOperations, fourier_modes
from shodh_moe.kernels import curl, differentiation_matrix, divergence
from shodh_moe.tokenizer.helmholtz import conserved_velocity, vector_potential
from shodh_moe.tokenizer.walls import project
from tests.tiny import LAYER, refused
from tests.trained import GRID, make_run

STEPS = 3
# Runs the code of the page portable/README.md, and keeps its forecast.
WITHOUT_US = """
import sys
sys.modules["shodh_moe"] = None  # importing it raises an error
import numpy as np, torch
given = np.load("given.npz")
velocity, pressure, solid = (torch.from_numpy(given[name]) for name in ("velocity", "pressure", "solid"))
steps = {steps}
{code}
fields = [torch.stack(values).numpy() for values in zip(*forecast)]
np.savez("forecast.npz", **dict(zip(("velocity", "pressure", "velocity_face"), fields)))
assert not [name for name in sys.modules if name.startswith("shodh_moe.")]
"""


def rms_divergence(u_N3XYZ: torch.Tensor, operator: str) -> float:
    return float(divergence(u_N3XYZ, operator).square().mean().sqrt() / u_N3XYZ.square().mean().sqrt())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_a_process_without_this_package_makes_our_forecast(tmp_path: Path, kind: str) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    run = make_run(tmp_path, operator="staggered", walls="exact")
    command = ["checkpoint", "export", str(run), "--output", str(tmp_path / "model"), "--portable", kind]
    assert main(command) == 0
    folder = tmp_path / "model/portable"
    parts = ["encoder", "paths", "step", "decoder"]
    assert sorted(path.name for path in folder.glob(f"*.{kind}")) == sorted(f"{part}.{kind}" for part in parts)
    facts = json.loads((folder / "portable.json").read_text())
    assert (list(facts["parts"]), facts["paths"], facts["grid"]) == (parts, "once", list(GRID))
    assert facts["parts"]["decoder"]["outputs"]["velocity"] == {"shape": [3, *GRID], "dtype": "float64"}
    flow = shodh_moe.open_dataset(tmp_path / "theirs", "test")[0, :2]
    np.savez(folder / "given.npz", **{name: values.numpy() for name, values in flow.items()})
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(code) == 1
    program = WITHOUT_US.format(steps=STEPS, code=code[0])
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    model = shodh_moe.load_model(tmp_path / "model")
    ours = model.forecast(flow, STEPS)
    with np.load(folder / "forecast.npz") as theirs:
        for name in ("velocity", "pressure", "velocity_face"):
            scale = float(ours[name].abs().max())
            np.testing.assert_allclose(theirs[name], ours[name], atol=1e-5 * scale, err_msg=name)
        assert rms_divergence(torch.from_numpy(theirs["velocity_face"]), "staggered") < 1e-13
    # A copy without them is still a model.
    for path in folder.iterdir():
        path.unlink()
    assert main(["checkpoint", "verify", str(tmp_path / "model")]) == 0


MODELS: dict[str, dict[str, Any]] = {
    "layer": {"moe": {"expert_hidden": 16, **LAYER}},
    "dense": {"moe": {"expert_hidden": 16, "num_experts": 0, "shared_experts": 1}},
    "film": {"film": True, "moe": {"expert_hidden": 16, "num_experts": 0, "shared_experts": 1}},
    "two of three": {"moe": {"expert_hidden": 16, "num_experts": 3, "top_k": 2, "attention": "low_rank"}},
    "window": {"moe": {"expert_hidden": 16, "router": {"context": "window", "window": 1}}},
    "both": {"moe": {"expert_hidden": 16, "attention": "shared", "router": {"context": "both", "kind": "linear"}}},
}


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_has_parts_that_compute_the_same(tmp_path: Path, name: str) -> None:
    model = shodh_moe.load_model(make_run(tmp_path, MODELS[name]))
    flow = shodh_moe.open_dataset(tmp_path / "theirs", "test")[1, :2]
    parts = make_parts(model)
    assert ("paths" in parts) == (name in ("two of three", "window", "both"))
    with torch.no_grad():
        latents, geometry = parts["encoder"](flow["velocity"], flow["pressure"], flow["solid"])
        once = model.transformer.path is None or model.transformer.config.moe.router.context == "sample"
        found, paths = [], parts["paths"](latents, geometry) if "paths" in parts else ()
        for step in range(STEPS):
            if step and not once:
                paths = parts["paths"](latents, geometry)
            latent = parts["step"](latents, geometry, *paths)
            latents = torch.cat([latents[1:], latent[None]])
            found.append(parts["decoder"](latent, flow["solid"])[0])
    ours = model.forecast(flow, STEPS)["velocity"]
    torch.testing.assert_close(torch.stack(found), ours, atol=1e-5 * float(ours.abs().max()), rtol=0)


def test_the_oracle_cannot_be_exported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, {"moe": {"expert_hidden": 16, "router": {"kind": "oracle"}}})
    command = ["checkpoint", "export", str(run), "--output", str(tmp_path / "model"), "--portable", "pt2"]
    refused(capfd, *command, says=("kind oracle needs each sample's domain", "leave --portable out"))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("operator", ["spectral", "central2", "central4", "staggered"])
def test_matrices_compute_what_the_kernels_compute(operator: str) -> None:
    grid = [8, 6, 10]
    generator = torch.Generator().manual_seed(1)
    u_B3XYZ = torch.randn(1, 3, *grid, generator=generator, dtype=torch.float64)
    solid_B1XYZ = (torch.rand(1, 1, *grid, generator=generator) > 0.8).double()
    matrices = MatrixOperations(grid, operator)

    def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
        torch.testing.assert_close(theirs, ours, atol=1e-9, rtol=0)

    for adjoint in (False, True):
        close(curl(u_B3XYZ, None, operator, adjoint=adjoint), matrices.curl(u_B3XYZ, None, operator, adjoint))
    close(vector_potential(u_B3XYZ, operator), matrices.vector_potential(u_B3XYZ))
    if operator == "spectral":
        return
    projected = matrices.project(u_B3XYZ, solid_B1XYZ, operator)
    close(project(u_B3XYZ, solid_B1XYZ, operator), projected)
    assert rms_divergence(projected, operator) < 1e-13
    by = (matrices.curl, matrices.vector_potential, matrices.project)
    from shodh_moe.tokenizer.helmholtz import Operations

    w_B3XYZ = u_B3XYZ * (1 - solid_B1XYZ)
    for walls in ("none", "ramp", "exact"):
        ours = conserved_velocity(w_B3XYZ, solid_B1XYZ, operator, walls)
        close(ours, conserved_velocity(w_B3XYZ, solid_B1XYZ, operator, walls, Operations(*by)))


@pytest.mark.parametrize("size", [1, 2, 7, 8])
def test_the_modes_diagonalise_every_laplacian(size: int) -> None:
    modes_NN = fourier_modes(size)
    torch.testing.assert_close(modes_NN.T @ modes_NN, torch.eye(size, dtype=torch.float64))
    derivative_NN = differentiation_matrix(size, "spectral", 1.0, torch.float64)
    laplacian_NN = modes_NN.T @ derivative_NN.T @ derivative_NN @ modes_NN
    torch.testing.assert_close(laplacian_NN, torch.diag(laplacian_NN.diagonal()), atol=1e-12, rtol=0)
