"""Curl and divergence in both forms: analytic fields, exact mass conservation, adjoints."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shodh_moe.kernels import curl, differentiation_matrix, divergence, divergence_adjoint, spectral_curl_cpu
from shodh_moe.kernels.differentiation import MINIMUM, OPERATORS
from tests.kernels.forms import DEVICE, form

FORMS = ("reference", "triton")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Triton uses the folded kernel for planes with multiples of 16, the plain kernel for others.
STEP = st.floats(0.1, 10.0)
SHAPES = st.tuples(st.integers(1, 2), *[st.integers(5, 8)] * 3) | st.sampled_from(
    [(1, 1, 2, 3), (1, 2, 7, 40), (2, 16, 2, 32), (1, 2, 32, 16)]
)


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, permuted: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if permuted:  # the same shape, other strides
        order = (1, *range(2, len(shape)), 0)
        moved = torch.randn([shape[i] for i in order], generator=generator, dtype=torch.float64)
        return moved.to(DEVICE, dtype).movedim(-1, 0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


Spacing = float | tuple[float, float, float]


def plain_derivative(f: Tensor, axis: int, operator: str, spacing: Spacing) -> Tensor:
    """Return the definition's result, differentiable: D along one of the last three axes."""
    step = spacing[axis] if isinstance(spacing, tuple) else spacing
    d = differentiation_matrix(f.shape[axis - 3], operator, step, f.dtype, f.device)
    return torch.movedim(torch.movedim(f, axis - 3, -1) @ d.T, -1, axis - 3)


def plain_curl(a: Tensor, mean: Tensor | None, operator: str, spacing: Spacing) -> Tensor:
    def d(axis: int, component: int) -> Tensor:
        return plain_derivative(a[:, component], axis, operator, spacing)

    u = torch.stack((d(1, 2) - d(2, 1), d(2, 0) - d(0, 2), d(0, 1) - d(1, 0)), dim=1)
    return u if mean is None else u + mean[:, :, None, None, None]


def plain_divergence(u: Tensor, operator: str, spacing: Spacing) -> Tensor:
    return sum((plain_derivative(u[:, i], i, operator, spacing) for i in range(3)), start=torch.zeros_like(u[:, 0]))


def agree(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """``expected`` is float64; ``got`` has the precision of ``dtype``."""
    assert got.dtype == dtype
    assert bool(got.isfinite().all())
    rounding = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert rms(got.double() - expected) <= rounding * rms(expected) + 1e-30


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_adjoint_of_the_divergence(name: str, operator: str, dtype: torch.dtype) -> None:
    u, g = random(2, 3, 5, 7, 6, dtype=dtype), random(2, 5, 7, 6, dtype=dtype, seed=1, permuted=True)
    with form(name):
        got = divergence_adjoint(g, operator, 0.5)
        agree(
            got, torch.func.vjp(lambda v: plain_divergence(v, operator, 0.5), u.double())[1](g.double())[0], got.dtype
        )
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        if dtype == torch.float64:
            torch.testing.assert_close((got * u).sum(), (g * divergence(u, operator, 0.5)).sum())
            gradient = torch.autograd.grad(divergence_adjoint(g.requires_grad_(), operator, 0.5), g, u)[0]
            torch.testing.assert_close(gradient, divergence(u, operator, 0.5))


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=10, deadline=None)
@given(
    SHAPES, st.sampled_from(DTYPES), st.sampled_from(OPERATORS), st.booleans(), st.booleans(),
    STEP | st.tuples(STEP, STEP, STEP), st.integers(0, 2**16),
)  # fmt: skip
def test_both_forms_equal_the_definition(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, operator: str, has_mean: bool, permuted: bool,
    spacing: Spacing, seed: int,
) -> None:  # fmt: skip
    if min(shape[1:]) < MINIMUM[operator]:
        operator = "spectral"
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    a = random(shape[0], 3, *shape[1:], dtype=dtype, seed=seed, permuted=permuted).requires_grad_()
    mean = random(shape[0], 3, dtype=dtype, seed=seed + 1).requires_grad_() if has_mean else None
    exact_a = a.detach().double().requires_grad_()
    exact_mean = None if mean is None else mean.detach().double().requires_grad_()
    with form(name):
        u, div = curl(a, mean, operator, spacing), divergence(a, operator, spacing)
        weight_u = random(*u.shape, dtype=computed, seed=seed + 2, permuted=permuted)
        weight_div = random(*div.shape, dtype=computed, seed=seed + 3, permuted=permuted)
        inputs = [a] if mean is None else [a, mean]
        got = torch.autograd.grad(u, inputs, weight_u)
        (got_div,) = torch.autograd.grad(div, a, weight_div)
    exact_u, exact_div = (
        plain_curl(exact_a, exact_mean, operator, spacing),
        plain_divergence(exact_a, operator, spacing),
    )
    agree(u, exact_u, computed)
    agree(div, exact_div, computed)
    exact_inputs = [exact_a] if exact_mean is None else [exact_a, exact_mean]
    expected = torch.autograd.grad(exact_u, exact_inputs, weight_u.double())
    for g, w in zip(got, expected, strict=True):
        agree(g, w, dtype)
    agree(got_div, torch.autograd.grad(exact_div, exact_a, weight_div.double())[0], dtype)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_mass_is_conserved_and_adjoints_are_adjoint(name: str, operator: str) -> None:
    box = (16, 7, 16)
    a, b, g = random(1, 3, *box), random(1, 3, *box, seed=1), random(1, *box, seed=2)
    spacing = 0.3
    with form(name):
        u = curl(a, random(1, 3), operator, spacing)
        assert spacing * rms(divergence(u, operator, spacing)) <= 1e-13 * rms(u)
        b_adjoint = curl(b, None, operator, spacing, adjoint=True)
        u.copy_(curl(a, None, operator, spacing))
        torch.testing.assert_close((u * b).sum(), (a * b_adjoint).sum())
        if operator != "staggered":
            torch.testing.assert_close(b_adjoint, curl(b, None, operator, spacing))
        a.requires_grad_()
        div = divergence(a, operator, spacing)
        (gradient,) = torch.autograd.grad(div, a, g)
        torch.testing.assert_close((div * g).sum(), (a * gradient).sum())
        # The transposed pair: a gradient has no (transposed) curl.
        assert spacing * rms(curl(gradient, None, operator, spacing, adjoint=True)) <= 1e-13 * rms(gradient)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("box", [(6, 7, 5), (16, 6, 16), (64, 64, 64)])  # each size has its own form
def test_the_spacing_may_differ_between_the_axes(name: str, operator: str, box: tuple[int, int, int]) -> None:
    if box[0] > 6 and (operator != "spectral" or (box[0] == 64 and name == "triton" and DEVICE.type == "cpu")):
        return  # has no other form, or is interpreted and slow
    spacing = (0.5, 2.0, 0.125)
    a, mean, g = random(1, 3, *box), random(1, 3), random(1, *box, seed=1)
    with form(name):
        u = curl(a, mean, operator, spacing)
        agree(u, plain_curl(a, mean, operator, spacing), torch.float64)
        agree(divergence(a, operator, spacing), plain_divergence(a, operator, spacing), torch.float64)
        assert min(spacing) * rms(divergence(u, operator, spacing)) <= 1e-13 * rms(u)
        adjoint = divergence_adjoint(g, operator, spacing)
        torch.testing.assert_close((adjoint * a).sum(), (g * divergence(a, operator, spacing)).sum())
        transposed = curl(a, None, operator, spacing, adjoint=True)
        torch.testing.assert_close((transposed * u).sum(), (a * curl(u, None, operator, spacing)).sum())
        for same in ([0.3] * 3, (0.3, 0.3, 0.3), torch.tensor([0.3] * 3, dtype=torch.float64), np.full(3, 0.3)):
            assert torch.equal(curl(a, None, operator, same), curl(a, None, operator, 0.3))


@pytest.mark.parametrize("box", [(32, 3, 48), (33, 3, 35), (3, 48, 32), (3, 20, 33)])
def test_many_tiles_in_a_plane(box: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from shodh_moe.kernels import spectral_curl_triton

    blocks = {"BLOCK_R": 16, "BLOCK_C": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(spectral_curl_triton, "settings", lambda *_: blocks)
    a, mean = random(1, 3, *box), random(1, 3, seed=1)
    with form("triton"):
        agree(curl(a, mean), plain_curl(a, mean, "spectral", 1.0), torch.float64)


def test_a_known_potential() -> None:
    """A = (0, 0, sin x cos y) has the Taylor-Green velocity (-sin x sin y, -cos x cos y, 0)."""
    n = 16
    h = 2 * math.pi / n
    x, y, _ = torch.meshgrid(*[torch.arange(n, dtype=torch.float64) * h] * 3, indexing="ij")
    a = torch.zeros(1, 3, n, n, n, dtype=torch.float64)
    a[0, 2] = torch.sin(x) * torch.cos(y)
    u = curl(a, torch.tensor([[0.5, 0.0, -1.0]], dtype=torch.float64), spacing=h)
    expected = torch.stack([-torch.sin(x) * torch.sin(y) + 0.5, -torch.cos(x) * torch.cos(y), torch.full_like(x, -1.0)])
    torch.testing.assert_close(u[0], expected, atol=1e-12, rtol=0)


def test_divergence_sees_a_compressive_flow() -> None:
    """The divergence is not zero for every field: u = (sin x, 0, 0) has divergence cos x."""
    n = 16
    h = 2 * math.pi / n
    u = torch.zeros(1, 3, n, n, n, dtype=torch.float64)
    x = torch.arange(n, dtype=torch.float64) * h
    u[0, 0] = torch.sin(x)[:, None, None]
    torch.testing.assert_close(divergence(u, spacing=h)[0, :, 0, 0], torch.cos(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradcheck(operator: str) -> None:
    a = random(1, 3, 5, 5, 6).requires_grad_()
    mean = random(1, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, m: curl(a, m, operator), (a, mean), fast_mode=True)
    assert torch.autograd.gradcheck(lambda a: divergence(a, operator), (a,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda a: divergence(a, operator), (a,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda a, m: curl(a, m, operator), (a, mean), fast_mode=True)


@pytest.mark.parametrize("name", FORMS)
def test_opcheck(name: str) -> None:
    a = random(1, 3, 2, 3, 4, dtype=torch.float32).requires_grad_()
    mean = random(1, 3, dtype=torch.float32).requires_grad_()
    half = random(1, 3, 5, 5, 6, dtype=torch.bfloat16).requires_grad_()
    ops = torch.ops.shodh
    with form(name):
        torch.library.opcheck(ops.curl.default, (a, mean, "spectral", [1.0, 0.5, 2.0], False))
        torch.library.opcheck(ops.curl.default, (half, None, "staggered", [1.0, 0.5, 2.0], True))
        torch.library.opcheck(ops.divergence.default, (half, "central4", [1.0, 0.5, 2.0]))
        g = a[:, 0].detach().requires_grad_()
        torch.library.opcheck(ops.divergence_backward.default, (g, "spectral", [1.0, 0.5, 2.0]))


def gradients(step: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    a = random(1, 3, 6, 6, 7, dtype=torch.float32).requires_grad_()
    mean = random(1, 3, dtype=torch.float32).requires_grad_()
    loss = step(a, mean)
    return (loss.detach(), *torch.autograd.grad(loss, (a, mean)))


def loss(a: Tensor, mean: Tensor) -> Tensor:
    u = curl(a * 2, mean)
    return u.square().sum() + divergence(a, "central2").square().sum()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("way", ["compile", "checkpoint", "autocast"])
def test_gradients_under_compile_checkpointing_and_autocast(name: str, way: str) -> None:
    context = contextlib.nullcontext()
    step = loss
    if way == "compile":
        torch.compiler.reset()
        step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    elif way == "checkpoint":
        step = lambda a, mean: checkpoint(loss, a, mean, use_reentrant=False)  # noqa: E731
    else:
        context = torch.autocast(DEVICE.type, dtype=torch.bfloat16)
    with form(name):
        expected = gradients(loss)
        with context:
            got = gradients(step)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("operator", ["staggered", "central2"])
def test_a_projection_that_uses_both_operators(operator: str) -> None:
    """Conjugate gradients alternate divergence and adjoint; both forms must converge to the same field."""
    project = pytest.importorskip("shodh_moe.tokenizer.walls").project  # needs more than torch
    solid = (random(1, 1, 5, 4, 6) > 0.8).float()
    w = random(1, 3, 5, 4, 6, dtype=torch.float32, seed=1)
    with form("reference"):
        expected = project(w, solid, operator)
    with form("triton"):
        torch.testing.assert_close(project(w, solid, operator), expected, rtol=0, atol=1e-5)


def test_autocast_does_not_round_the_products() -> None:
    a = random(1, 3, 8, 8, 8, dtype=torch.float32)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        u = curl(a)
    assert torch.equal(u, curl(a))


def tf32(x: Tensor) -> Tensor:
    """Round to the 10 mantissa bits of TF32, ties away from zero like the hardware's cvt.rna."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def tf32x3(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b like the tensor cores: hi hi + hi lo + lo hi, products of TF32 numbers summed in float32."""
    a_hi, b_hi = tf32(a), tf32(b)
    a_lo, b_lo = tf32(a - a_hi), tf32(b - b_hi)
    return a_hi @ b_lo + a_lo @ b_hi + a_hi @ b_hi


@pytest.mark.parametrize("fold", [False, True])
def test_tf32x3_keeps_float32_accuracy(fold: bool) -> None:
    """Emulate the GPU's arithmetic, since Triton's interpreter multiplies in float32 at any precision."""
    size = 128
    d = differentiation_matrix(size, "spectral", 1.0, torch.float64)
    f = torch.randn(size, 4096, generator=torch.Generator().manual_seed(0))
    exact = d @ f.double()

    def derivative(product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if not fold:
            return product(d.float(), f)
        c0, c1 = d[: size // 2].chunk(2, dim=1)
        near, far = f.chunk(2)
        plus = product(((c0 + c1) / 2).float(), near + far)
        minus = product(((c0 - c1) / 2).float(), near - far)
        return torch.cat((plus + minus, plus - minus))

    assert rms(derivative(tf32x3) - exact) <= 1e-6 * rms(exact)
    assert rms(derivative(lambda a, b: tf32(a) @ tf32(b)) - exact) > 1e-4 * rms(exact)  # a single TF32 product does not


@pytest.mark.parametrize("operator", OPERATORS)
def test_full_size_accuracy(operator: str) -> None:
    """At 128 points per axis float32 is accurate to 1e-6, and the float64 mass balance to 1e-13."""
    box = (128, 32, 64)
    a = random(1, 3, *box)
    u = curl(a, operator=operator)
    assert rms(curl(a.float(), operator=operator) - u) <= 1e-6 * rms(u)
    assert rms(divergence(u, operator)) <= 1e-13 * rms(u)


@settings(max_examples=15, deadline=None)
@given(
    box=st.tuples(*[st.integers(1, 13).map(lambda half: 2 * half)] * 3),
    batch=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    with_mean=st.booleans(),
    adjoint=st.booleans(),
)
def test_the_form_for_large_cpu_fields(box, batch, dtype, with_mean, adjoint) -> None:
    """Halves that are not multiples of four and axes of two points test the remainders of the loops."""
    a = torch.randn(batch, 3, *box, dtype=dtype)
    mean = torch.randn(batch, 3, dtype=dtype) if with_mean else None
    with form("reference"):
        expected = curl(a.double(), None if mean is None else mean.double(), "spectral", (0.5, 1.0, 0.75), adjoint)
    results = []
    for threads in (1, 2):
        with mock.patch("torch.get_num_threads", return_value=threads):
            results.append(spectral_curl_cpu.curl(a, mean, [0.5, 1.0, 0.75], adjoint))
    assert torch.equal(*results)  # the same bits for any number of threads
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert rms(results[0] - expected) <= tolerance * max(rms(expected), 1)


def test_large_cpu_fields_use_it_and_conserve_mass() -> None:
    a = torch.randn(1, 3, 64, 66, 68, dtype=torch.float64)
    mean = torch.ones(1, 3, dtype=torch.float64)
    with form("auto"), mock.patch.object(spectral_curl_cpu, "curl", wraps=spectral_curl_cpu.curl) as used:
        u = curl(a, mean)
    used.assert_called_once()
    assert rms(divergence(u)) <= 1e-13 * rms(u)
    with form("reference"):
        torch.testing.assert_close(u, curl(a, mean), rtol=0, atol=1e-12)
    for unfit in (a[..., :62], a[..., :67], a.bfloat16()):
        assert not spectral_curl_cpu.fits(unfit)


def test_an_empty_batch() -> None:
    for name in FORMS:
        with form(name):
            assert curl(torch.zeros(0, 3, 4, 4, 4, device=DEVICE)).shape == (0, 3, 4, 4, 4)
            assert divergence(torch.zeros(0, 3, 4, 4, 4, device=DEVICE)).shape == (0, 4, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: curl(torch.zeros(3, 8, 8, 8)), r"potential_B3XYZ has shape \[3, 8, 8, 8\]; expected \[B, 3, X, Y"),
        (lambda: curl(torch.zeros(1, 2, 8, 8, 8)), r"potential_B3XYZ has shape \[1, 2, 8, 8, 8\]"),
        (lambda: divergence(torch.zeros(1, 4, 8, 8, 8)), r"u_B3XYZ has shape \[1, 4, 8, 8, 8\]"),
        (lambda: curl(torch.zeros(1, 3, 8, 8, 8, dtype=torch.int32)), "potential_B3XYZ has dtype torch.int32"),
        (lambda: divergence(torch.zeros(1, 3, 8, 8, 8, dtype=torch.complex64)), "u_B3XYZ has dtype torch.complex64"),
        (lambda: curl(torch.zeros(2, 3, 8, 8, 8), torch.zeros(1, 3)), r"mean_B3 has shape \[1, 3\]; expected \[2, 3\]"),
        (lambda: curl(torch.zeros(1, 3, 8, 8, 8), torch.zeros(3)), r"mean_B3 has shape \[3\]; expected \[1, 3\]"),
        (lambda: curl(torch.zeros(1, 3, 8, 8, 8), torch.zeros(1, 3).int()), "mean_B3 has dtype torch.int32"),
        (lambda: curl(torch.zeros(1, 3, 8, 8, 8), torch.zeros(1, 3, device="meta")), "mean_B3 is on meta; potential"),
        (lambda: curl(torch.zeros(1, 3, 4, 4, 4), operator="upwind"), "unknown derivative operator 'upwind'"),
        (lambda: curl(torch.zeros(1, 3, 4, 257, 4)), "Y of potential_B3XYZ is 257: .* at most 256"),
        (lambda: divergence(torch.zeros(1, 3, 8, 8, 4), "central4"), "Z of u_B3XYZ is 4: .* at least 5"),
        (lambda: curl(torch.zeros(1, 3, 0, 4, 4)), "X of potential_B3XYZ is 0: .* at least 1"),
        (lambda: divergence_adjoint(torch.zeros(1, 8, 8, 4), "central4"), "Z of g_BXYZ is 4: .* at least 5"),
        (lambda: divergence_adjoint(torch.zeros(8, 8, 8)), r"g_BXYZ has shape \[8, 8, 8\]; expected \[B, X, Y, Z\]"),
        (lambda: curl(torch.zeros(1, 3, 8, 8, 8), spacing=0.0), "spacing must be positive and finite, not 0.0"),
        (lambda: divergence(torch.zeros(1, 3, 8, 8, 8), spacing=-1.0), "spacing must be positive"),
        (lambda: curl(torch.zeros(1, 3, 8, 8, 8), spacing=(1.0, 2.0)), r"one positive number or three.*\(1.0, 2.0\)"),
        (lambda: curl(torch.zeros(1, 3, 8, 8, 8), spacing=(1.0, 0.0, 1.0)), "positive and finite, not 0.0"),
        (lambda: curl(torch.zeros(1, 3, 8, 8, 8), spacing="wide"), "positive and finite, not 'wide'"),
        (lambda: divergence(torch.zeros(1, 3, 8, 8, 8), spacing=None), "positive and finite, not None"),
        (lambda: divergence_adjoint(torch.zeros(1, 8, 8, 8), spacing=[1.0] * 4), "one positive number or three"),
        (lambda: differentiation_matrix(8, "central2", (1.0, 1.0, 1.0), torch.float64), "positive and finite, not"),
    ],
)  # fmt: skip
def test_invalid_input_is_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_local_operators_have_no_size_limit() -> None:
    a = random(1, 3, 5, 300, 5)
    assert rms(divergence(curl(a, operator="central4"), "central4")) <= 1e-13 * rms(a)
