"""Top-k gating: choice, slots, drops and losses against plain loops and hand-made cases."""

from __future__ import annotations

import collections
import itertools
import math

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from shodh_moe.kernels import Gating, cosine_topk_gating, expert_capacity, topk_gating
from shodh_moe.kernels.cosine_gating import reference_logits
from shodh_moe.kernels.gating import assign_slots, reference_gating
from tests.kernels.forms import DEVICE, form


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "minimum", "expected"),
    [
        (50, 4, 1.2, 1, 15),  # float32 arithmetic gives 16 (DeepSpeed 0.19.8)
        (10, 4, 1.0, 1, 3),
        (8, 4, 1.0, 4, 4),
        (1, 2, 1.25, 1, 1),
        (2**20, 3, 1.0, 1, 349526),
    ],
)
def test_capacity_is_exact(tokens, experts, factor, minimum, expected):
    assert expert_capacity(tokens, experts, factor, minimum) == expected


def _slots_by_loop(expert: list[int], gate: list[float], capacity: int, order: str) -> list[int]:
    """Return the slot of each token, one token at a time."""
    tokens = range(len(expert))
    queue = tokens if order == "position" else sorted(tokens, key=lambda n: -gate[n])
    kept, used = set(), collections.Counter()
    for n in queue:
        if used[expert[n]] < capacity:
            used[expert[n]] += 1
            kept.add(n)
    slot, filled = [], collections.Counter()
    for n in tokens:
        slot.append(filled[expert[n]] if n in kept else -1)
        filled[expert[n]] += n in kept
    return slot


def _logits(tokens: int, experts: int, kind: str, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    if kind == "ties":
        logits = logits.round()
    elif kind == "one expert":
        logits[:, experts // 2] += 100
    elif kind == "empty expert":
        logits[:, experts // 2] -= 100
    elif kind == "-inf":
        logits[torch.rand(logits.shape, generator=torch.Generator().manual_seed(seed)) < 0.3] = -math.inf
        logits[:, 0] = logits[:, 0].clamp(min=0)
    elif kind == "huge":
        logits *= 1e30
    return logits.to(DEVICE, dtype)


KINDS = ("normal", "ties", "one expert", "empty expert", "-inf", "huge")


@pytest.mark.parametrize("name", ["reference", "triton"])
@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 90),
    experts=st.integers(1, 9),
    capacity=st.integers(1, 40),
    order=st.sampled_from(["position", "probability"]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    biased=st.booleans(),
    top_k=st.sampled_from([1, 1, 2, 3, 8]),
    seed=st.integers(0, 2**16),
)
def test_routing_equals_a_loop(name, tokens, experts, capacity, order, kind, dtype, biased, top_k, seed):
    """Check experts against the logits and slots against the operation's gates, so that rounding hides no mistake."""
    kind = "normal" if kind == "huge" and dtype == torch.float16 else kind
    top_k = min(top_k, experts)
    logits = _logits(tokens, experts, kind, seed, dtype)
    bias = torch.linspace(-0.3, 0.3, experts, device=DEVICE) if biased else None
    with form(name):
        g = topk_gating(logits, capacity, order, bias, top_k=top_k)
    assert g.expert_N.shape == g.slot_N.shape == g.gate_N.shape == ((tokens,) if top_k == 1 else (tokens, top_k))
    chosen = g.expert_N.view(tokens, top_k).tolist()
    if bias is None:
        best = [sorted(range(experts), key=lambda e: (-row[e], e)) for row in logits.tolist()]
        assert chosen == [row[:top_k] for row in best]
    else:
        score = torch.softmax(logits.double(), 1) + bias
        best = score.gather(1, g.expert_N.view(tokens, top_k))
        torch.testing.assert_close(best, score.sort(1, descending=True).values[:, :top_k], atol=1e-6, rtol=0)
        assert all(len(set(row)) == top_k for row in chosen)
    expert = g.expert_N.flatten().tolist()
    assert g.slot_N.flatten().tolist() == _slots_by_loop(expert, g.gate_N.flatten().tolist(), capacity, order)
    assert g.routed_E.tolist() == [expert.count(e) for e in range(experts)]
    assert g.kept_E.tolist() == [min(capacity, int(count)) for count in g.routed_E]


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 90),
    experts=st.integers(1, 20),
    order=st.sampled_from(["position", "probability"]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    transposed=st.booleans(),
    top_k=st.sampled_from([1, 1, 2, 5]),
    seed=st.integers(0, 2**16),
)
def test_triton_equals_the_reference_forward_and_backward(tokens, experts, order, kind, dtype, transposed, top_k, seed):
    top_k = min(top_k, experts)
    logits = _logits(tokens, experts, kind, seed, dtype)
    logits = logits.T.contiguous().T if transposed else logits
    d_gate, d_mean_p = torch.randn(tokens * top_k, device=DEVICE), torch.randn(experts, device=DEVICE)
    results = []
    for name in ("reference", "triton"):
        x = logits.detach().requires_grad_()
        with form(name):
            g = topk_gating(x, 7, order, top_k=top_k)
            # a huge z-loss overflows float32 in both; its gradient is tested elsewhere
            loss = (g.gate_N.flatten() * d_gate).sum() + 2 * g.balance_loss + (0 if kind == "huge" else 3 * g.z_loss)
            (loss + (g.mean_p_E * d_mean_p).sum()).backward()
        floats = (g.gate_N, g.entropy_N, g.balance_loss, g.z_loss, g.mean_p_E)
        results.append((*(t.detach() for t in floats), x.grad))
        integers = (g.expert_N, g.routed_E, g.kept_E, *((g.slot_N,) if order == "position" else ()))
        results[-1] += tuple(integers)
    for reference, triton in zip(*results, strict=True):
        assert reference.dtype == triton.dtype
        tolerance = {"rtol": 1e-2, "atol": 1e-3} if reference.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(triton, reference, **tolerance)


@pytest.mark.parametrize(("tokens", "experts"), [(700, 256), (1, 256), (5000, 2), (600, 100)])
@pytest.mark.parametrize("order", ["position", "probability"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_triton_over_many_tiles(tokens, experts, order, top_k):
    """More tokens than a tile holds, the maximum number of experts, and numbers that are not powers of two."""
    logits = _logits(tokens, experts, "ties", 1)
    capacity = max(tokens // experts, 1)
    with form("triton"):
        g = topk_gating(logits, capacity, order, top_k=top_k)
        again = topk_gating(logits, capacity, order, top_k=top_k)
    # A stable sort puts the lowest index first among equal logits.
    expert = logits.cpu().sort(dim=1, descending=True, stable=True).indices[:, :top_k].flatten().tolist()
    assert g.expert_N.flatten().tolist() == expert
    assert g.slot_N.flatten().tolist() == _slots_by_loop(expert, g.gate_N.flatten().tolist(), capacity, order)
    assert all(torch.equal(a, b) for a, b in zip(g, again, strict=True))  # the same bits every run


def test_triton_over_more_tiles_than_chunks(monkeypatch):
    """Each program then processes several tiles: 2^20 tokens have this effect on a GPU, three chunks have it here."""
    from shodh_moe.kernels import gating_triton

    monkeypatch.setattr(gating_triton, "CHUNKS", 3)
    logits = _logits(4000, 5, "normal", 0)
    for order, top_k in itertools.product(("position", "probability"), (1, 2)):
        with form("triton"):
            g = topk_gating(logits, 500, order, top_k=top_k)
        reference = reference_gating(logits, 500, order, None, top_k)
        flat = (g.expert_N.flatten().tolist(), g.gate_N.flatten().tolist())
        assert g.slot_N.flatten().tolist() == _slots_by_loop(*flat, 500, order)
        torch.testing.assert_close(g.balance_loss, reference.balance_loss)
        torch.testing.assert_close(g.z_loss, reference.z_loss)


def test_ties_go_to_the_lowest_expert():
    g = topk_gating(torch.zeros(5, 4), 3)
    assert g.expert_N.tolist() == [0] * 5
    assert g.slot_N.tolist() == [0, 1, 2, -1, -1]


def test_probability_order_keeps_the_most_probable():
    logits = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    assert topk_gating(logits, 2, "probability").slot_N.tolist() == [-1, 0, 1]
    assert topk_gating(logits, 2, "position").slot_N.tolist() == [0, 1, -1]


def test_bias_moves_the_choice_but_not_the_gate():
    logits = torch.tensor([[1.0, 0.9]])
    g = topk_gating(logits, 1, bias_E=torch.tensor([0.0, 1.0]))
    assert g.expert_N.item() == 1
    assert g.gate_N.item() == pytest.approx(torch.softmax(logits, 1)[0, 1].item())


def test_each_choice_claims_a_slot_in_the_order_of_the_tokens():
    logits = torch.tensor([[3.0, 2.0, 0.0], [2.0, 3.0, 0.0], [0.0, 3.0, 2.0]])
    g = topk_gating(logits, 2, top_k=2)
    assert g.expert_N.tolist() == [[0, 1], [1, 0], [1, 2]]
    assert g.slot_N.tolist() == [[0, 0], [1, 1], [-1, 0]]  # the second choice of token 0 is before the first of token 2
    assert g.routed_E.tolist() == [2, 3, 1]
    assert g.kept_E.tolist() == [2, 2, 1]
    # By probability, the second choice of token 0 loses its slot at expert 1.
    assert topk_gating(logits, 2, "probability", top_k=2).slot_N.tolist() == [[0, -1], [0, 1], [1, 0]]


def test_all_experts_chosen_is_a_dense_mixture():
    logits = torch.randn(6, 4)
    g = topk_gating(logits, 6, top_k=4)
    p = torch.softmax(logits, 1)
    torch.testing.assert_close(torch.zeros(6, 4).scatter(1, g.expert_N, g.gate_N), p)
    assert g.balance_loss.item() == pytest.approx(1.0)  # an even load
    torch.testing.assert_close(g.mean_p_E, p.mean(0))


def test_losses_at_their_known_values():
    """Uniform probabilities and perfect balance: balance loss 1, z-loss ln(E)^2."""
    g = topk_gating(torch.zeros(8, 4), 8)
    assert g.balance_loss.item() == pytest.approx(1.0)
    assert g.z_loss.item() == pytest.approx(math.log(4) ** 2)
    one_sided = topk_gating(torch.tensor([[50.0, 0.0]] * 6), 6)
    assert one_sided.balance_loss.item() == pytest.approx(2.0)


def test_gate_carries_the_gradient_of_its_softmax():
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    topk_gating(logits, 6).gate_N.sum().backward()
    p = torch.softmax(logits.detach(), 1)
    best = p.max(1).values[:, None]
    one_hot = torch.nn.functional.one_hot(p.argmax(1), 3)
    torch.testing.assert_close(logits.grad, best * (one_hot - p))


@pytest.mark.parametrize("order", ["position", "probability"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_reference_passes_gradcheck_by_autograd_and_by_formula(order, top_k):
    def differentiable(g: Gating) -> tuple[torch.Tensor, ...]:
        return g.gate_N, g.balance_loss, g.z_loss, g.mean_p_E

    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: differentiable(reference_gating(x, 2, order, None, top_k)), (x,))
    assert torch.autograd.gradcheck(lambda x: differentiable(topk_gating(x, 2, order, top_k=top_k)), (x,))


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_extreme_logits_stay_finite(name):
    with form(name):
        g = topk_gating(torch.tensor([[1e30, -1e30], [0.0, -math.inf]], device=DEVICE), 2)
    assert g.expert_N.tolist() == [0, 0]
    assert g.gate_N.tolist() == [1.0, 1.0]
    assert g.entropy_N.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("row", [[math.nan, 0.0], [0.0, math.nan], [math.inf, 0.0], [-math.inf, -math.inf]])
def test_logits_without_a_softmax_raise_and_name_the_token(name, row):
    logits = torch.tensor([[0.0, 1.0], row, row], device=DEVICE)
    with form(name), pytest.raises(ValueError, match="token 1 are NaN or infinite"):
        topk_gating(logits, 2)
    with form(name):
        g = topk_gating(logits, 2, check_finite=False)
        both = topk_gating(logits, 2, check_finite=False, top_k=2)
    assert g.expert_N.max() < 2
    assert not g.z_loss.isfinite()
    assert both.expert_N.sort(1).values.tolist() == [[0, 1]] * 3  # no expert twice, so that no row has two tokens


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: topk_gating(torch.zeros(1, 2), 1, "random"), "drop_order"),
        (lambda: topk_gating(torch.zeros(4), 1), "logits_NE must be a 2-dimensional"),
        (lambda: topk_gating(torch.zeros(4, 2, dtype=torch.int32), 1), "logits_NE must be .* floating-point"),
        (lambda: topk_gating(torch.zeros(0, 2), 1), "between 1 and 2\\^31 - 1 tokens, not 0, times top_k 1"),
        (lambda: topk_gating(torch.zeros(4, 257), 1), "1 to 256 experts, not 257"),
        (lambda: topk_gating(torch.zeros(4, 2), 0), "capacity must be .* not 0"),
        (lambda: topk_gating(torch.zeros(4, 2), 1, top_k=3), "top_k must be between 1 and 2 of 2 experts, not 3"),
        (lambda: topk_gating(torch.zeros(4, 20), 1, top_k=9), "top_k must be between 1 and 8 of 20 experts, not 9"),
        (lambda: topk_gating(torch.zeros(4, 2), 1, bias_E=torch.zeros(3)), r"bias_E must be \[2\]"),
        (lambda: topk_gating(torch.zeros(4, 2), 1, bias_E=torch.zeros(2, device="meta")), "bias_E must be"),
        (lambda: _cosine(projection=torch.zeros(3, 6)), r"projection_RD must be torch.float32 \[3, 5\]"),
        (lambda: _cosine(prototypes=torch.zeros(2, 3).double()), "prototypes_ER must be torch.float32"),
        (lambda: _cosine(temperature=torch.ones(())), "temperature must be"),
        (lambda: _cosine(torch.zeros(200, 5), torch.zeros(2, 200)), "have 200 dimensions; at most 128"),
    ],
)
def test_invalid_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def _cosine(projection=None, prototypes=None, temperature=None):
    projection = torch.zeros(3, 5) if projection is None else projection
    prototypes = torch.zeros(2, 3) if prototypes is None else prototypes
    temperature = torch.ones(1) if temperature is None else temperature
    return cosine_topk_gating(torch.zeros(4, 5), projection, prototypes, temperature, 1)


def _cosine_inputs(tokens: int, experts: int, width: int, routing: int, dtype: torch.dtype = torch.float32):
    torch.manual_seed(tokens)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(tokens, width, dtype=dtype, device=DEVICE)
    weights = [torch.randn(shape, dtype=exact, device=DEVICE) for shape in ((routing, width), (experts, routing))]
    return [t.requires_grad_() for t in (x, *weights, torch.full((1,), 0.3, dtype=exact, device=DEVICE))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "experts", "width", "routing", "top_k"),
    [(70, 4, 33, 8, 1), (40, 64, 64, 20, 1), (1, 2, 5, 1, 1), (9, 70, 16, 16, 1), (40, 6, 33, 8, 3)],
)
def test_cosine_entry_equals_scores_then_gating(tokens, experts, width, routing, top_k, dtype):
    inputs = _cosine_inputs(tokens, experts, width, routing, dtype)
    results = []
    for name in ("plain", "reference", "triton"):
        for t in inputs:
            t.grad = None
        if name == "plain":
            q = inputs[0].to(torch.float32) @ inputs[1].T
            g = reference_gating(reference_logits(q, *inputs[2:]), 3, "position", None, top_k)
        else:
            with form(name):
                g = cosine_topk_gating(*inputs, 3, top_k=top_k)
        (g.gate_N.sum() + 2 * g.balance_loss + g.z_loss + g.mean_p_E[0]).backward()
        results.append([*g, *(t.grad for t in inputs)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(b, a, rtol=2e-2 if a.dtype == torch.bfloat16 else 2e-4, atol=1e-4)


def test_cosine_gradcheck():
    inputs = _cosine_inputs(6, 3, 4, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: tuple(cosine_topk_gating(*t, 2)[i] for i in (0, 6, 7)), inputs)


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("order", ["position", "probability"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_operators_pass_opcheck(name, order, top_k):
    logits = _logits(12, 3, "normal", 0).requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    with form(name):
        settings = (3, order, None, True, top_k)
        torch.library.opcheck(torch.ops.shodh.topk_gating.default, (logits, *settings), test_utils=tests)
        inputs = _cosine_inputs(12, 3, 5, 4)
        cosine = torch.ops.shodh.cosine_topk_gating.default
        torch.library.opcheck(cosine, (*inputs, *settings), test_utils=tests)
        g = torch.ops.shodh.topk_gating(logits.detach(), *settings)
        one = torch.ones((), device=DEVICE)
        backward = (logits.detach(), g[8], g[1], g[3], g[0], one, one, g[9])
        torch.library.opcheck(torch.ops.shodh.topk_gating_backward.default, backward, test_utils=tests)


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_compile_without_graph_break_checkpointing_and_autocast(name):
    weight = torch.randn(5, 3, device=DEVICE, requires_grad=True)
    x = torch.randn(20, 5, device=DEVICE)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        g = topk_gating(x @ weight, 4)
        return (g.gate_N * (g.slot_N >= 0)).sum() + g.balance_loss + g.z_loss

    with form(name):
        (expected,) = torch.autograd.grad(loss(weight), weight)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        checkpointed = torch.utils.checkpoint.checkpoint(loss, weight, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(compiled(weight), weight)[0], expected)
        torch.testing.assert_close(torch.autograd.grad(checkpointed, weight)[0], expected)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            value = loss(weight)  # the preceding product runs in bfloat16, the gating in float32
        assert value.dtype == torch.float32
        torch.testing.assert_close(torch.autograd.grad(value, weight)[0], expected, rtol=0.1, atol=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: a million tokens")
@pytest.mark.parametrize("order", ["position", "probability"])
@pytest.mark.parametrize(("tokens", "experts"), [(2**20, 8), (2**20 - 7, 256)])
def test_a_million_tokens(tokens, experts, order):
    logits = _logits(tokens, experts, "normal", 3)
    g = topk_gating(logits, tokens // experts, order)
    assert torch.equal(g.expert_N, logits.argmax(1))
    assert torch.equal(g.slot_N, assign_slots(g.expert_N, g.gate_N, g.routed_E, tokens // experts, order))
