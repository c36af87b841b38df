"""Dispatch and combine in all forms, compared with a differentiable definition and a golden case; invalid input."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shodh_moe.kernels import topk_gating
from shodh_moe.kernels.dispatch import combine, dispatch
from tests.kernels.forms import DEVICE, form

# On a CPU "auto" is the compiled form; on a GPU it is Triton again.
FORMS = pytest.mark.parametrize("kernels", ["reference", "triton", "auto"])
# One rounding to the narrow dtype, and float32 sums of up to 40 products in two orders.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def expected_dispatch(x_ND: Tensor, expert_N: Tensor, slot_N: Tensor, kept_E: Tensor, capacity: int | None) -> Tensor:
    """Return the definition's result, token by token; differentiable."""
    shape = x_ND.shape if capacity is None else (kept_E.numel(), capacity, x_ND.shape[1])
    rows = list(x_ND.new_zeros(shape).view(-1, x_ND.shape[1]))
    if capacity is None:
        rows += [x_ND.new_zeros(x_ND.shape[1])] * (expert_N.numel() - len(rows))
        shape = (len(rows), x_ND.shape[1])
    for choice, row in enumerate(rows_of(expert_N, slot_N, kept_E, capacity)):
        if row is not None:
            rows[row] = x_ND[choice * len(x_ND) // expert_N.numel()]
    return torch.stack(rows).view(shape)


def expected_combine(
    rows: Tensor, expert_N: Tensor, slot_N: Tensor, gate_N: Tensor, kept_E: Tensor, shared_ND: Tensor | None = None
) -> Tensor:
    flat = rows.reshape(-1, rows.shape[-1]).to(gate_N.dtype)
    y = list(flat.new_zeros(len(expert_N), flat.shape[1]) if shared_ND is None else shared_ND.to(gate_N.dtype))
    for choice, row in enumerate(rows_of(expert_N, slot_N, kept_E, rows.shape[1] if rows.ndim == 3 else None)):
        if row is not None:
            token = choice * len(expert_N) // expert_N.numel()
            y[token] = y[token] + gate_N.flatten()[choice] * flat[row]
    return torch.stack(y).to(rows.dtype)


def rows_of(expert_N: Tensor, slot_N: Tensor, kept_E: Tensor, capacity: int | None) -> list[int | None]:
    kept = kept_E.tolist()
    starts = [sum(kept[:e]) if capacity is None else e * capacity for e in range(len(kept))]
    return [
        starts[e] + s if 0 <= e < len(kept) and 0 <= s < kept[e] else None
        for e, s in zip(expert_N.flatten().tolist(), slot_N.flatten().tolist(), strict=True)
    ]


class Case(NamedTuple):
    x_ND: Tensor
    expert_N: Tensor
    slot_N: Tensor
    kept_E: Tensor
    gate_N: Tensor
    shared_ND: Tensor
    capacity: int | None

    @property
    def routing(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.expert_N, self.slot_N, self.kept_E


def case(
    tokens, width, experts, capacity, dropless, dtype=torch.float32, routes="mixed", integers=torch.int64, seed=0,
    choices=None,
):  # fmt: skip
    """Kept tokens take their expert's slots in a random order. ``choices``: experts per token, in a second axis."""
    draw = torch.Generator().manual_seed(seed)
    total = tokens * (choices or 1)
    expert = torch.randint(experts, (total,), generator=draw)
    if routes == "one expert":
        expert.fill_(experts - 1)
    slot, kept = torch.full((total,), -1), torch.zeros(experts, dtype=torch.long)
    for token in torch.randperm(total, generator=draw).tolist():
        e = int(expert[token])
        if routes != "all dropped" and kept[e] < (total if dropless else capacity):
            if dropless and routes == "mixed" and seed % 2 and token % 3 == 0:
                continue  # dropless with dropped tokens leaves empty rows at the end
            slot[token] = kept[e]
            kept[e] += 1

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(DEVICE, dtype)

    x, shared = normal(tokens, width), normal(tokens, width)
    gate = torch.rand(total, generator=draw, dtype=torch.float64)
    gate = gate.to(DEVICE, torch.float64 if dtype == torch.float64 else torch.float32)
    if choices:
        expert, slot, gate = (t.view(tokens, choices) for t in (expert, slot, gate))
    index = [t.to(DEVICE, integers) for t in (expert, slot, kept)]
    return Case(x, *index, gate, shared, None if dropless else capacity)


def close(actual, expected):
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gradients(output, inputs, seed=1):
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad(output, inputs, weight.to(output.device, output.dtype))


@FORMS
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 70),
    width=st.integers(1, 40),
    experts=st.integers(1, 9),
    capacity=st.integers(1, 20),
    dropless=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    routes=st.sampled_from(["mixed", "mixed", "one expert", "all dropped"]),
    integers=st.sampled_from([torch.int64, torch.int32]),
    with_shared=st.booleans(),
    choices=st.sampled_from([None, None, 1, 2, 3]),
    seed=st.integers(0, 2**16),
)
def test_results_equal_the_definition_forward_and_backward(
    kernels, tokens, width, experts, capacity, dropless, dtype, routes, integers, with_shared, choices, seed
):
    c = case(tokens, width, experts, capacity, dropless, dtype, routes, integers, seed, choices)
    x = c.x_ND.requires_grad_()
    expected = expected_dispatch(x, *c.routing, c.capacity)
    with form(kernels):
        rows = dispatch(x, *c.routing, c.capacity)
        assert torch.equal(rows, expected)
        if expected.requires_grad and choices in (None, 1):  # a token was kept
            assert torch.equal(gradients(rows, [x])[0], gradients(expected, [x])[0])
        elif expected.requires_grad:  # a sum over choices, which autograd rounds after each addition
            close(gradients(rows, [x])[0], gradients(expected, [x])[0])
        else:
            assert not gradients(rows, [x])[0].any()

    values = torch.randn(expected.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    inputs = [values.requires_grad_(), c.gate_N.requires_grad_()]
    shared = c.shared_ND.requires_grad_() if with_shared else None
    inputs += [shared] if with_shared else []
    expected = expected_combine(values, c.expert_N, c.slot_N, c.gate_N, c.kept_E, shared)
    # Connect every input to the graph, so that the gradient of one without a kept token is zero.
    expected = expected + sum(0 * t.sum() for t in inputs).to(dtype)
    with form(kernels):
        y = combine(values, c.expert_N, c.slot_N, c.gate_N, c.kept_E, shared)
        close(y, expected)
        for actual, reference in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
            assert actual.dtype == reference.dtype
            close(actual, reference)


@FORMS
@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(2, 6), st.integers(1, 20), st.booleans(), st.integers(0, 2**16))
def test_round_trip_returns_kept_tokens_scaled_and_zeros_for_dropped(
    kernels, tokens, experts, capacity, dropless, seed
):
    torch.manual_seed(seed)
    x = torch.randn(tokens, 5, device=DEVICE)
    with form(kernels):
        capacity = tokens if dropless else capacity
        g = topk_gating(torch.randn(tokens, experts, device=DEVICE), capacity)
        rows = dispatch(x, g.expert_N, g.slot_N, g.kept_E, None if dropless else capacity)
        assert rows.shape == ((tokens, 5) if dropless else (experts, capacity, 5))
        assert (rows.abs().sum(-1) > 0).sum() == g.kept_E.sum()
        if dropless:
            expert = torch.repeat_interleave(torch.arange(experts, device=DEVICE), g.kept_E)
            assert torch.equal(rows, x[torch.argsort(g.expert_N, stable=True)])
            assert torch.equal(expert, g.expert_N.sort().values)
        y = combine(rows, g.expert_N, g.slot_N, g.gate_N, g.kept_E)
    kept = (g.slot_N >= 0)[:, None]
    torch.testing.assert_close(y, torch.where(kept, x * g.gate_N[:, None], 0.0))


@FORMS
def test_golden_case(kernels):
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], device=DEVICE)
    expert, slot = torch.tensor([2, 0, 2, 0], device=DEVICE), torch.tensor([1, 0, 0, -1], device=DEVICE)
    kept = torch.tensor([1, 0, 2], device=DEVICE)
    gate, shared = torch.tensor([0.5, 2.0, 1.0, 9.0], device=DEVICE), torch.full((4, 2), 10.0, device=DEVICE)
    with form(kernels):
        slots = dispatch(x, expert, slot, kept, 2)
        rows = dispatch(x, expert, slot, kept, None)
        y = combine(slots, expert, slot, gate, kept, shared)
        assert torch.equal(y, combine(rows, expert, slot, gate, kept, shared))
    assert slots.tolist() == [[[3, 4], [0, 0]], [[0, 0], [0, 0]], [[5, 6], [1, 2]]]
    assert rows.tolist() == [[3, 4], [5, 6], [1, 2], [0, 0]]
    assert y.tolist() == [[10.5, 11], [16, 18], [15, 16], [10, 10]]


@FORMS
@pytest.mark.parametrize("dropless", [False, True])
def test_no_tokens(kernels, dropless):
    c = case(0, 3, 2, 4, dropless)
    x, gate = c.x_ND.requires_grad_(), c.gate_N.requires_grad_()
    with form(kernels):
        rows = dispatch(x, *c.routing, c.capacity)
        y = combine(rows, c.expert_N, c.slot_N, gate, c.kept_E, c.shared_ND)
        y.sum().backward()
    assert torch.equal(rows, torch.zeros(0, 3) if dropless else torch.zeros(2, 4, 3, device=DEVICE))
    assert y.shape == x.grad.shape == (0, 3)
    assert gate.grad.shape == (0,)


@FORMS
@pytest.mark.parametrize("dropless", [False, True])
def test_programs_work_in_tiles(kernels, dropless):
    c = case(23, 1100, 3, 40, dropless)  # wider than a tile; more slots than one program zeroes
    inputs = [c.x_ND.requires_grad_(), c.gate_N.requires_grad_(), c.shared_ND.requires_grad_()]

    def both(dispatch, combine):
        rows = dispatch(c.x_ND, *c.routing, c.capacity)
        return combine(rows.sin(), c.expert_N, c.slot_N, c.gate_N, c.kept_E, c.shared_ND)

    expected = both(expected_dispatch, expected_combine)
    with form(kernels):
        actual = both(dispatch, combine)
        close(actual, expected)
        for got, reference in zip(gradients(actual, inputs), gradients(expected, inputs), strict=True):
            torch.testing.assert_close(got, reference, rtol=1e-5, atol=1e-4)


@FORMS
@pytest.mark.parametrize("dropless", [False, True])
def test_non_contiguous_tensors(kernels, dropless):
    c = case(9, 6, 3, 2, dropless)

    def strided(t):
        return torch.stack([t, torch.full_like(t, 99)], dim=-1)[..., 0]

    s = Case(*(strided(t) for t in c[:6]), c.capacity)
    assert not s.x_ND.is_contiguous()
    with form(kernels):
        results = []
        for k in (c, s):
            x, gate = k.x_ND.requires_grad_(), k.gate_N.requires_grad_()
            rows = dispatch(x, *k.routing, k.capacity)
            values = rows if k is c else strided(rows)
            y = combine(values, k.expert_N, k.slot_N, gate, k.kept_E, k.shared_ND)
            weight = torch.arange(6.0, device=DEVICE).expand_as(y)  # a gradient with stride 0
            results.append((rows, y, *torch.autograd.grad(y, [x, gate], weight)))
    for plain, other in zip(*results, strict=True):
        assert torch.equal(plain, other)


@FORMS
@pytest.mark.parametrize("dropless", [False, True])
@pytest.mark.parametrize(
    ("expert", "slot"), [(0, 10**6), (0, -5), (0, -(2**40)), (-1, 0), (3, 0), (2**40, 0), (-(2**40), 1), (1, 2**62)]
)
def test_tokens_out_of_range_count_as_dropped(kernels, dropless, expert, slot):
    c = case(8, 4, 3, 3, dropless)
    # Add a token that is routed nowhere; the others keep their slots. Any copy of its values would be detected.
    x = torch.cat([c.x_ND, torch.full((1, 4), torch.inf, device=DEVICE)])
    experts = torch.cat([c.expert_N, torch.tensor([expert], device=DEVICE)])
    slots = torch.cat([c.slot_N, torch.tensor([slot], device=DEVICE)])
    gate = torch.cat([c.gate_N, torch.full((1,), torch.nan, device=DEVICE)]).requires_grad_()
    with form(kernels):
        rows = dispatch(x.requires_grad_(), experts, slots, c.kept_E, c.capacity)
        reference = dispatch(c.x_ND, *c.routing, c.capacity)
        assert torch.equal(rows[: len(c.x_ND)] if dropless else rows, reference)
        y = combine(rows, experts, slots, gate, c.kept_E)
        y.sum().backward()
    assert not y[-1].any()
    assert not x.grad[-1].any()
    assert gate.grad[-1] == 0
    assert torch.isfinite(y).all()
    assert torch.isfinite(gate.grad).all()


def test_nothing_outside_the_rows_is_written(monkeypatch):
    """Triton writes only into its window of a larger buffer, for any routing."""
    dispatch_triton = pytest.importorskip("shodh_moe.kernels.dispatch_triton")
    poison = 12345.0

    original = Tensor.new_empty

    def guarded(self, *size, **options):
        if options:  # the interpreter's own copies
            return original(self, *size, **options)
        count = torch.Size(size[0] if not isinstance(size[0], int) else size).numel()
        buffer = torch.full((count + 128,), poison, dtype=self.dtype, device=self.device)
        return buffer[64 : 64 + count].view(*size)

    tokens, width, experts = 13, 5, 3
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=draw).to(DEVICE)
    monkeypatch.setattr(Tensor, "new_empty", guarded)
    for trial in range(8):
        shape = (tokens,) if trial < 4 else (tokens, 3)
        gate = torch.rand(shape, generator=draw).to(DEVICE)
        expert = torch.randint(-2, experts + 2, shape, generator=draw).to(DEVICE)
        slot = torch.randint(-3, 9, shape, generator=draw).to(DEVICE)
        kept = torch.randint(-2, 30, (experts,), generator=draw).to(DEVICE)
        rows = dispatch_triton.dispatch(x, expert, slot, kept, 4 if trial % 2 else None)
        y = dispatch_triton.gather(rows, expert, slot, kept, gate, x)
        for out in (rows, y, *dispatch_triton.combine_backward(x, rows, expert, slot, gate, kept)):
            before, after = out.as_strided((64,), (1,), 0), out.as_strided((64,), (1,), 64 + out.numel())
            assert (before == poison).all()
            assert (after == poison).all()


@FORMS
def test_infinite_empty_and_dropped_rows_do_not_leak(kernels):
    c = case(6, 3, 2, 2, dropless=False, routes="one expert")
    rows = torch.full((2, 2, 3), torch.nan, device=DEVICE)
    rows[1] = 1.0
    gate = torch.where(c.slot_N >= 0, c.gate_N, torch.inf).requires_grad_()
    with form(kernels):
        y = combine(rows.requires_grad_(), c.expert_N, c.slot_N, gate, c.kept_E)
        y.sum().backward()
    for finite in (y, rows.grad, gate.grad):
        assert torch.isfinite(finite).all()
    assert not rows.grad[0].any()


@FORMS
@pytest.mark.parametrize("dropless", [False, True])
@pytest.mark.parametrize("choices", [None, 2])
def test_gradcheck(kernels, dropless, choices):
    c = case(7, 4, 3, 2, dropless, torch.float64, choices=choices)
    inputs = [t.requires_grad_() for t in (c.x_ND, c.gate_N, c.shared_ND)]

    def function(x, gate, shared):
        rows = dispatch(x, *c.routing, c.capacity)
        return combine(rows.sin(), c.expert_N, c.slot_N, gate, c.kept_E, shared)

    with form(kernels):
        assert torch.autograd.gradcheck(function, inputs)


@FORMS
@pytest.mark.parametrize("dropless", [False, True])
@pytest.mark.parametrize("choices", [None, 2])
def test_opcheck(kernels, dropless, choices):
    c = case(7, 4, 3, 2, dropless, choices=choices)
    rows = expected_dispatch(c.x_ND, *c.routing, c.capacity).detach()
    x, gate, shared = (t.requires_grad_() for t in (c.x_ND, c.gate_N, c.shared_ND))
    ops = torch.ops.shodh
    with form(kernels):
        torch.library.opcheck(ops.dispatch, (x, *c.routing, c.capacity))
        torch.library.opcheck(ops.dispatch_backward, (rows, *c.routing))
        routing = (c.expert_N, c.slot_N, gate, c.kept_E)
        torch.library.opcheck(ops.combine, (rows.requires_grad_(), *routing, shared))
        torch.library.opcheck(ops.combine, (rows, *routing, None))
        detached = (c.expert_N, c.slot_N, gate.detach(), c.kept_E)
        torch.library.opcheck(ops.combine_backward, (x.detach(), rows.detach(), *detached))


@FORMS
@pytest.mark.parametrize("dropless", [False, True])
def test_compile_checkpoint_and_autocast(kernels, dropless):
    c = case(12, 8, 3, 4, dropless)
    inputs = [t.requires_grad_() for t in (c.x_ND, c.gate_N, c.shared_ND)]

    def function(x, gate, shared):
        rows = dispatch(x, *c.routing, c.capacity)
        return combine(rows * 2, c.expert_N, c.slot_N, gate, c.kept_E, shared)

    def checkpointed(*tensors):
        return torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=False)

    def autocast(*tensors):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            return function(*tensors)

    with form(kernels):
        plain = function(*inputs)
        reference = gradients(plain, inputs)
        for other in (torch.compile(function, fullgraph=True, backend="aot_eager"), checkpointed, autocast):
            y = other(*inputs)
            assert torch.equal(y, plain)
            for got, want in zip(gradients(y, inputs), reference, strict=True):
                assert torch.equal(got, want)


@FORMS
def test_only_the_requested_gradients_are_computed(kernels):
    c = case(5, 3, 2, 3, dropless=False)
    with form(kernels):
        rows = dispatch(c.x_ND, *c.routing, 3)
        assert not rows.requires_grad
        shared = c.shared_ND.requires_grad_()
        y = combine(rows, c.expert_N, c.slot_N, c.gate_N, c.kept_E, shared)
        assert torch.equal(gradients(y, [shared], seed=3)[0], gradients(shared * 1, [shared], seed=3)[0])
        y = combine(rows, c.expert_N, c.slot_N, c.gate_N.requires_grad_(), c.kept_E)
        assert gradients(y, [c.gate_N])[0].shape == (5,)


@FORMS
def test_invalid_input_is_refused(kernels):
    c = case(5, 4, 3, 2, dropless=False)
    x, expert, slot, kept, gate, shared, _ = c
    rows = torch.zeros(3, 2, 4, device=DEVICE)
    with form(kernels):
        for match, bad in [
            (r"x_ND must have shape \[any, any\], not \[5\]", (x[:, 0], expert, slot, kept, 2)),
            ("x_ND must be torch.float32 or .*, not torch.int64", (x.long(), expert, slot, kept, 2)),
            (r"expert_N must have shape \[5\], not \[4\]", (x, expert[:4], slot, kept, 2)),
            ("expert_N must be torch.int64 or torch.int32, not torch.float32", (x, expert.float(), slot, kept, 2)),
            (r"slot_N must have shape \[5\], not \[5, 1\]", (x, expert, slot[:, None], kept, 2)),
            ("slot_N must be on .* not on meta", (x, expert, slot.to("meta"), kept, 2)),
            ("kept_E must be torch.int64", (x, expert, slot, kept.bool(), 2)),
            ("kept_E must hold 1 to 256 experts, not 0", (x, expert, slot, kept[:0], 2)),
            ("kept_E must hold 1 to 256 experts, not 300", (x, expert, slot, kept.new_zeros(300), 2)),
            ("capacity must be at least 1, or None for dropless, not 0", (x, expert, slot, kept, 0)),
        ]:
            with pytest.raises(ValueError, match=match):
                dispatch(*bad)
        for match, bad in [
            ("rows must be .E, K, D. or .N, D., not", (x[:, 0], expert, slot, gate, kept)),
            (r"rows must have shape \[5, any\], not \[3, 4\]", (x[:3], expert, slot, gate, kept)),
            (r"rows must have shape \[3, any, any\], not \[2, 2, 4\]", (rows[:2], expert, slot, gate, kept)),
            ("rows must hold at least one slot", (rows[:, :0], expert, slot, gate, kept)),
            ("rows must be torch.float32 or", (rows.to(torch.int8), expert, slot, gate, kept)),
            (r"slot_N must have shape \[5\]", (rows, expert, slot[:3], gate, kept)),
            (r"gate_N must have shape \[5\], not \[5, 1\]", (rows, expert, slot, gate[:, None], kept)),
            ("gate_N must be torch.float32, not torch.float64", (rows, expert, slot, gate.double(), kept)),
            ("gate_N must be torch.float64, not torch.float32", (rows.double(), expert, slot, gate, kept)),
            ("shared_ND must be torch.float32, not torch.bf", (rows, expert, slot, gate, kept, shared.bfloat16())),
            (r"shared_ND must have shape \[5, 4\], not \[5, 3\]", (rows, expert, slot, gate, kept, shared[:, :3])),
            ("shared_ND must be on .*, not on meta", (rows, expert, slot, gate, kept, shared.to("meta"))),
        ]:
            with pytest.raises(ValueError, match=match):
                combine(*bad)
