"""The lattice Boltzmann kernels against the torch reference, and the GPU solver against the CPU solver."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shodh_moe.base.errors import UserError
from shodh_moe.kernels import backend
from shodh_moe.kernels import lattice_boltzmann as reference
from shodh_moe.solvers import on_gpu
from shodh_moe.solvers.lattice_boltzmann import LatticeBoltzmann
from shodh_moe.solvers.limits import DivergedError
from shodh_moe.solvers.on_gpu import LatticeBoltzmannGPU
from tests.kernels.forms import DEVICE

pytest.importorskip("triton")

from shodh_moe.kernels import lattice_boltzmann_triton as kernels

SHAPE = (6, 5, 4)
TOLERANCE = {torch.float64: 1e-15, torch.float32: 1e-7}  # of populations around 0.05, scalars up to 1


def random_solid(shape: tuple[int, int, int], lid: bool) -> torch.Tensor:
    solid = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.3
    solid[:, :, 0] |= lid
    solid[0, 0, -1] = False
    return solid.to(DEVICE)


def follow(
    shape: tuple[int, int, int], dtype: torch.dtype, lid: bool, smagorinsky: float, mode: str, steps: int = 2
) -> None:
    """Step both forms from a random state; after every step the whole state must agree, solid cells included."""
    generator = torch.Generator().manual_seed(2)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    def rows(field: torch.Tensor) -> torch.Tensor:
        return field.flatten(1).clone()

    solid, viscosity, diffusivity = random_solid(shape, lid), 0.02, 0.01
    u, held = 0.05 * random(3, *shape), 0.05 * random(3, *shape)
    f = reference.equilibrium(u, solid) + (1e-3 * random(19, *shape)).masked_fill(solid, 0)
    g = reference.scalar_equilibrium(random(*shape).abs(), u, solid)
    word_N = kernels.cell_words(solid, lid)
    flow, carried = [rows(f), torch.zeros_like(rows(f))], [rows(g), torch.zeros_like(rows(g))]
    rates_4 = kernels.flow_rates(viscosity, smagorinsky, f)
    velocity_3N = {"free": None, "held": rows(held), "scalar": torch.zeros_like(rows(u))}[mode]
    close = {"rtol": 0, "atol": TOLERANCE[dtype]}
    for number in range(1, steps + 1):
        force = torch.tensor([1e-3, -2e-3, 3e-3], dtype=dtype, device=DEVICE) * number
        f = reference.step(
            f, solid, force, viscosity, lid=lid, smagorinsky=smagorinsky,
            held_velocity_3XYZ=held if mode == "held" else None,
        )  # fmt: skip
        kernels.step(
            *flow, word_N, shape, force, rates_4, velocity_3N, lid=lid, eddies=smagorinsky > 0, held=mode == "held"
        )
        flow.reverse()
        torch.testing.assert_close(flow[0], rows(f), **close)
        if mode == "scalar":
            u = reference.velocity(f, force, solid)
            torch.testing.assert_close(velocity_3N, rows(u), **close)
            g = reference.scalar_step(g, u, solid, diffusivity, lid=lid)
            rates_2 = g.new_tensor(reference.scalar_rates(diffusivity))
            kernels.scalar_step(*carried, word_N, shape, velocity_3N, rates_2, lid=lid)
            carried.reverse()
            torch.testing.assert_close(carried[0], rows(g), **close)


@pytest.mark.parametrize("mode", ["free", "held", "scalar"])
@pytest.mark.parametrize("smagorinsky", [0.0, 0.16])
@pytest.mark.parametrize("lid", [False, True])
def test_a_step_equals_the_reference(lid: bool, smagorinsky: float, mode: str) -> None:
    follow(SHAPE, torch.float64, lid, smagorinsky, mode)


@pytest.mark.parametrize(("smagorinsky", "mode"), [(0.0, "free"), (0.16, "scalar"), (0.0, "held")])
def test_float32_agrees_up_to_rounding(smagorinsky: float, mode: str) -> None:
    follow(SHAPE, torch.float32, True, smagorinsky, mode)


@pytest.mark.parametrize("shape", [(6, 5, 8), (1, 2, 3), (1, 1, 9)])
def test_several_blocks_and_axes_that_wrap_onto_themselves(shape: tuple[int, int, int]) -> None:
    follow(shape, torch.float64, False, 0.0, "scalar")


def test_indices_have_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INDEX_LIMIT", 1)
    follow(SHAPE, torch.float64, True, 0.0, "scalar", steps=1)


@pytest.fixture
def tiny_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use two steps and one instead of more than a hundred, since the interpreter is slow."""
    monkeypatch.setattr(on_gpu, "settling", lambda shape, lid: (2, 0.7))
    monkeypatch.setattr(on_gpu, "STRESS_STEPS", 1)


@pytest.mark.parametrize("carries", [False, True])
def test_the_solver_agrees_with_the_cpu_solver(carries: bool) -> None:
    rng = np.random.default_rng(0)
    solid_XYZ = random_solid(SHAPE, True).cpu().numpy()
    arguments = {"lid": True, "dtype": np.float64, "smagorinsky": 0.16, "diffusivity": 0.01 if carries else None}
    flows = [
        LatticeBoltzmann(solid_XYZ, 0.05, **arguments),
        LatticeBoltzmannGPU(solid_XYZ, 0.05, device=DEVICE, **arguments),
    ]
    velocity, scalar, force = 0.02 * rng.standard_normal((3, *SHAPE)), rng.random(SHAPE), rng.random((3, 3)) / 1000
    for flow in flows:
        flow.set_velocity(velocity)
        if carries:
            flow.set_scalar(scalar)
        flow.run(force)
        flow.step(force[0])
        flow.check("a flow")
    cpu, gpu = flows
    for field in ("velocity", "pressure", *(["scalar"] if carries else [])):
        np.testing.assert_allclose(getattr(gpu, field)(), getattr(cpu, field)(), rtol=0, atol=1e-15)
        assert not getattr(gpu, field)()[..., solid_XYZ].any()
        assert getattr(gpu, field)(np.float32).dtype == np.float32
    assert gpu.n_fluid == cpu.n_fluid
    assert gpu.mass() == pytest.approx(cpu.mass(), abs=1e-13)


@pytest.mark.usefixtures("tiny_settling")
def test_settling_keeps_the_velocity_and_the_scalar() -> None:
    solid = random_solid(SHAPE, False)
    start = 0.02 * torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(DEVICE)
    flow = LatticeBoltzmannGPU(solid.cpu().numpy(), 0.05, dtype=np.float64, diffusivity=0.1, device=DEVICE)
    scalar = np.random.default_rng(0).random(SHAPE)
    flow.set_scalar(scalar)
    flow.set_velocity(start.cpu().numpy(), settle_pressure=True)
    f = reference.equilibrium(start, solid)
    for rates in ((1.0, 0.7), (1.0, 0.7), None):
        f = reference.step(f, solid, [0, 0, 0], 0.05, held_velocity_3XYZ=start, rates=rates)
    np.testing.assert_allclose(flow.pressure(), reference.pressure(f).cpu().numpy(), rtol=0, atol=1e-15)
    np.testing.assert_allclose(flow.scalar(), np.where(solid.cpu(), 0, scalar), atol=1e-15)


def test_settling_takes_as_many_steps_as_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, tuple[float, float] | None]] = []
    solid_XYZ = np.zeros((40, 20, 24), bool)
    solid_XYZ[:, :, 0] = True
    cpu = LatticeBoltzmann(solid_XYZ, 0.05, lid=True)
    monkeypatch.setattr(cpu, "_advance", lambda force, velocity, mode, rates=None: taken.append((len(force), rates)))
    cpu.set_velocity(np.zeros((3, 40, 20, 24)), settle_pressure=True)
    steps, rate = on_gpu.settling(solid_XYZ.shape, lid=True)
    assert taken == [(steps, (1.0, rate)), (on_gpu.STRESS_STEPS, None)]


@pytest.fixture
def pretended_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use graphs of two steps; without a GPU they are lists of recorded launches."""
    monkeypatch.setattr(on_gpu, "GRAPH_STEPS", 2)
    if DEVICE.type == "cuda":
        return

    class Graph:
        launches: list[backend.Launch]

        def replay(self) -> None:
            for launch in self.launches:
                backend.launch(launch.kernel, (1,), *launch.args, **launch.meta)

    @contextlib.contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        with backend.record() as graph.launches:
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())


@pytest.mark.usefixtures("pretended_graphs", "tiny_settling")
def test_graphs_give_the_same_bits_as_single_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    solid_XYZ = random_solid(SHAPE, True).cpu().numpy()
    rng = np.random.default_rng(0)
    force, scalar, start = rng.random((7, 3)) / 1000, rng.random(SHAPE), 0.02 * rng.standard_normal((3, *SHAPE))
    found = []
    for graphs in (False, True):
        flow = LatticeBoltzmannGPU(solid_XYZ, 0.05, lid=True, diffusivity=0.01, device=DEVICE)
        monkeypatch.setattr(on_gpu, "uses_graphs", lambda device, graphs=graphs: graphs)
        flow.set_scalar(scalar)
        flow.run(force[:4])
        flow.set_velocity(start, settle_pressure=True)  # an odd number of steps between two graphs
        flow.run(force[4:])
        assert (flow._graph is not None) is graphs
        found.append((flow.velocity().tobytes(), flow.scalar().tobytes()))
    assert found[0] == found[1]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: long runs")
@pytest.mark.gpu
@pytest.mark.parametrize("smagorinsky", [0.0, 0.16])
def test_a_long_run_in_float32_agrees_with_the_cpu_up_to_rounding(smagorinsky: float) -> None:
    shape = (48, 40, 32)
    solid_XYZ = random_solid(shape, True).cpu().numpy()
    force, scalar = np.tile([1e-5, 0, 0], (500, 1)), np.random.default_rng(0).random(shape)
    arguments = {"lid": True, "smagorinsky": smagorinsky, "diffusivity": 0.01}
    cpu, gpu = LatticeBoltzmann(solid_XYZ, 0.05, **arguments), LatticeBoltzmannGPU(solid_XYZ, 0.05, **arguments)
    for flow in (cpu, gpu):
        flow.set_scalar(scalar)
        flow.run(force)
    for field in ("velocity", "scalar"):
        expected = getattr(cpu, field)()
        assert np.abs(getattr(gpu, field)() - expected).max() < 1e-5 * np.abs(expected).max()


def test_divergence_is_reported_by_name() -> None:
    flow = LatticeBoltzmannGPU(np.zeros((3, 3, 3), bool), 0.1, device=DEVICE)
    flow.set_velocity(np.full((3, 3, 3, 3), 0.2))
    with pytest.raises(DivergedError, match=r"flow 7: speed 0\.346 exceeds 0\.3"):
        flow.check("flow 7")
    flow.set_velocity(np.full((3, 3, 3, 3), np.nan))
    with pytest.raises(DivergedError, match=r"flow 7: .*non-finite"):
        flow.check("flow 7")


@pytest.mark.parametrize(
    ("mask", "arguments", "message"),
    [
        (np.ones((3, 3, 3), bool), {}, "solid_XYZ must be"),
        (np.zeros((3, 3), bool), {}, "solid_XYZ must be"),
        (np.zeros((3, 3, 3), bool), {"viscosity": 0.0}, "viscosity must be"),
        (np.zeros((3, 3, 3), bool), {"smagorinsky": -1.0}, "smagorinsky must"),
        (np.zeros((3, 3, 3), bool), {"diffusivity": 0.0}, "diffusivity must"),
        (np.zeros((3, 3, 3), bool), {"lid": True}, "bottom"),
    ],
)
def test_invalid_arguments_are_refused(mask: np.ndarray, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatticeBoltzmannGPU(mask, **{"viscosity": 0.1, "device": DEVICE} | arguments)


def test_a_scalar_must_be_requested_and_have_the_right_shape() -> None:
    mask = np.zeros((3, 3, 3), bool)
    with pytest.raises(ValueError, match="diffusivity"):
        LatticeBoltzmannGPU(mask, 0.1, device=DEVICE).set_scalar(np.ones((3, 3, 3)))
    with pytest.raises(ValueError, match=r"\[3, 3, 3\], not \[3, 3\]"):
        LatticeBoltzmannGPU(mask, 0.1, diffusivity=0.1, device=DEVICE).set_scalar(np.ones((3, 3)))


def test_without_a_gpu_the_error_names_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((3, 3, 3), bool)
    if DEVICE.type != "cuda":
        with pytest.raises(UserError, match="torch finds no GPU"):
            LatticeBoltzmannGPU(mask, 0.1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="TRITON_INTERPRET=1"):
        LatticeBoltzmannGPU(mask, 0.1, device="cpu")
    monkeypatch.setattr(on_gpu.importlib, "util", SimpleNamespace(find_spec=lambda name: None))
    with pytest.raises(UserError, match="not installed"):
        LatticeBoltzmannGPU(mask, 0.1)
