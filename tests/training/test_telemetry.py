"""Telemetry: sums over tokens against plain loops, warnings given once, records in metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shodh_moe.config import ModelConfig, MoEConfig, TelemetryConfig
from shodh_moe.model import LatentTransformer, Routing
from shodh_moe.parallel import Exchange, ExpertParallel, SampleExchange
from shodh_moe.trackers import sender
from shodh_moe.trackers.load_maps import COLUMNS, EVEN, STARVED, LoadMaps
from shodh_moe.training.log import Log
from shodh_moe.training.telemetry import (
    ExchangeCounts,
    RoutingCounts,
    Warnings,
    _traffic,
    first_nonfinite,
    layer_records,
)
from tests.tiny import LAYER

DOMAINS = ["calm", "wild", "absent"]
DOMAIN_B = torch.tensor([0, 1, 1, 0])


def _routing(seed: int, tokens: int = 12, experts: int = 3) -> Routing:
    torch.manual_seed(seed)
    logits = 3 * torch.randn(tokens, experts)
    gate, expert = torch.softmax(logits, 1).max(1)
    lse, zero = torch.logsumexp(logits, 1), torch.zeros(())
    kept, count = torch.rand(tokens) < 0.6, torch.bincount(expert, minlength=experts)
    return Routing(
        zero, zero, zero, expert, kept, torch.rand(tokens), gate, lse, expert, count, torch.softmax(logits, 1).mean(0)
    )


def _model(**moe) -> LatentTransformer:
    config = ModelConfig(dim=24, depth=2, heads=2, moe=MoEConfig(**LAYER, num_experts=3, expert_hidden=8, **moe))
    return LatentTransformer(config, 4, [2, 2, 2], 0, ExpertParallel()).train()


def test_sums_equal_a_loop_over_tokens():
    steps = [[_routing(0), _routing(1)], [_routing(2), _routing(3)]]
    counts = RoutingCounts(2, DOMAINS, 3)
    for routing in steps:
        counts.add(routing, DOMAIN_B)
    for layer, record in enumerate(counts.summary()):
        assert record["layer"] == layer
        tokens = [
            (
                DOMAINS[DOMAIN_B[n // 3]],
                int(r.expert_N[n]),
                bool(r.kept_N[n]),
                float(r.entropy_N[n]),
                float(r.gate_N[n]),
            )
            for r in (routing[layer] for routing in steps)
            for n in range(12)
        ]
        for domain in ("calm", "wild"):
            in_domain = [t for t in tokens if t[0] == domain]
            assert record["load"][domain] == pytest.approx([sum(t[1] == e for t in in_domain) / 12 for e in range(3)])
            assert record["dropped_fraction"][domain] == pytest.approx(sum(not t[2] for t in in_domain) / 12)
            assert record["entropy"][domain] == pytest.approx(sum(t[3] for t in in_domain) / 12)
            assert record["mean_gate"][domain] == pytest.approx(sum(t[4] for t in in_domain) / 12)
        assert record["load_all"] == pytest.approx([sum(t[1] == e for t in tokens) / 24 for e in range(3)])
        assert record["load"]["absent"] == [0, 0, 0]
        assert record["dropped_fraction"]["absent"] == 0
    assert counts.table_LDM[0, :, :3].sum() == 24  # evaluation reads the counts themselves
    counts.clear()
    assert counts.summary()[0]["load_all"] == [0, 0, 0]


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_largest_logit_is_the_routers_largest(kind):
    model = _model(router={"kind": kind})
    seen = []
    gating_of = model.blocks[1].moe.router.forward
    model.blocks[1].moe.router.forward = lambda x, *rest: (seen.append(x), gating_of(x, *rest))[1]
    routing = model(torch.randn(4, 2, 4, 2, 2, 2), torch.randn(4, 4, 2, 2, 2)).routing
    counts = RoutingCounts(2, DOMAINS, 3)
    counts.add(routing, DOMAIN_B)
    router, x = model.blocks[1].moe.router, seen[0].detach()
    logits = x @ router.projection.weight.T
    if kind == "cosine":
        normal = torch.nn.functional.normalize
        logits = normal(logits, dim=1) @ normal(router.prototypes_ER, dim=1).T / router.temperature
    assert counts.summary()[1]["largest_logit"] == pytest.approx(float(logits.detach().max()), abs=1e-4)


def test_a_token_counts_once_for_each_of_its_experts():
    model = _model(top_k=2, router={"kind": "linear"}, capacity_factor=0.7, min_capacity=1)
    prediction = model(torch.randn(4, 2, 4, 2, 2, 2), torch.randn(4, 4, 2, 2, 2))
    counts = RoutingCounts(2, DOMAINS, 3)
    counts.add(prediction.routing, DOMAIN_B)
    for layer, record in zip(prediction.routing, counts.summary(), strict=True):
        tokens = layer.chosen_N.view(4, 8, 2)
        for number, domain in enumerate(("calm", "wild")):
            chosen = tokens[number == DOMAIN_B].flatten()
            load = torch.bincount(chosen, minlength=3) / len(chosen)
            assert record["load"][domain] == pytest.approx(load.tolist())
            here = (number == DOMAIN_B).repeat_interleave(8)
            dropped = 1 - layer.kept_N[here].float().mean()
            assert record["dropped_fraction"][domain] == pytest.approx(float(dropped))
            assert record["entropy"][domain] == pytest.approx(float(layer.entropy_N[here].mean()))
            assert record["mean_gate"][domain] == pytest.approx(float(layer.gate_N[here].mean()))
        assert not layer.kept_N.all()
        assert record["load_all"] == pytest.approx((layer.routed_E / 64).tolist())


def test_the_advice_names_the_setting_that_balances():
    (line,) = Warnings(TelemetryConfig(), "bias").check(1, [_layer([1.0, 0.0], 0.0)])
    assert "raise model.moe.router.bias_rate or" in line


def test_tokens_that_are_not_finite_do_not_affect_the_others():
    routing = _routing(0)
    routing.entropy_N[0] = routing.gate_N[0] = routing.logsumexp_N[0] = torch.nan
    counts = RoutingCounts(1, DOMAINS, 3)
    counts.add([routing], DOMAIN_B)
    (record,) = counts.summary()
    assert record["entropy"]["calm"] == pytest.approx(float(routing.entropy_N[[1, 2, 9, 10, 11]].sum()) / 6)
    assert math.isfinite(record["largest_logit"])


def test_the_first_nonfinite_layer_and_domain_are_found():
    routing = [_routing(layer) for layer in range(3)]
    assert first_nonfinite(routing, DOMAIN_B, DOMAINS) is None
    routing[2].logsumexp_N[0] = torch.inf
    routing[1].logsumexp_N[7] = torch.nan  # the eighth token of four samples of three: the third sample
    assert first_nonfinite(routing, DOMAIN_B, DOMAINS) == (1, "wild")


def test_a_nonfinite_sample_raises_in_evaluation_but_never_in_training():
    """If training raised on one rank, the others would wait forever; the training loop checks the loss instead."""
    model = _model()
    history, geometry = torch.randn(4, 2, 4, 2, 2, 2), torch.randn(4, 4, 2, 2, 2)
    history[2, 0, 0, 0, 0, 0] = torch.nan
    assert first_nonfinite(model(history, geometry).routing, DOMAIN_B, DOMAINS) == (0, "wild")
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.eval()(history, geometry)


def test_records_hold_temperature_norms_and_traffic():
    model = _model(router={"temperature": 0.2})
    with torch.no_grad():
        model.blocks[1].moe.router.log_temperature.fill_(-100.0)
    counts = RoutingCounts(2, DOMAINS, 3)
    counts.add([_routing(0), _routing(1)], DOMAIN_B)
    exchanges = [
        Exchange(1, "dispatch", 300, [1.0, 1.5, 2.0]),
        Exchange(1, "combine", 30, [2.0, 2.0, 2.25]),
        Exchange(1, "combine", 30, [3.0, 3.0, 3.25]),
    ]
    norms = torch.arange(6.0, dtype=torch.float64).view(2, 3)
    first, second = layer_records(counts, model.routers, exchanges, norms)
    assert first["temperature"] == pytest.approx(0.2)
    assert second["temperature"] == pytest.approx(0.01)  # its floor
    assert (first["expert_grad_norm"], second["expert_grad_norm"]) == ([0, 1, 2], [3, 4, 5])
    nothing = {"ms": 0, "wait_ms": 0, "bytes": 0}
    assert first["all_to_all"] == {**nothing, "dispatch": nothing, "combine": nothing}
    assert second["all_to_all"] == {
        "ms": 1500, "wait_ms": 1000, "bytes": 360,
        "dispatch": {"ms": 1000, "wait_ms": 500, "bytes": 300}, "combine": {"ms": 500, "wait_ms": 500, "bytes": 60},
    }  # fmt: skip
    linear = _model(router={"kind": "linear"})
    assert layer_records(counts, linear.routers, [], None)[0]["temperature"] is None


def test_shares_of_samples_are_means_over_micro_batches():
    counts = ExchangeCounts()
    for held, computed, strangers in (([6, 2], [5, 3], 1), ([4, 4], [4, 4], 0)):
        exchange = SampleExchange.__new__(SampleExchange)
        exchange.held_G, exchange.computed_G, exchange.strangers = held, computed, strangers
        counts.add(exchange)
    exchanges = [
        Exchange(0, "samples", 300, [1.0, 1.5, 2.0]),
        Exchange(0, "samples", 30, [2.0, 2.0, 2.25]),
        Exchange(0, "combine", 7, [3.0, 3.0, 3.25]),
    ]
    expected = {"held_imbalance": 1.25, "imbalance": 1.125, "by_tokens": 1 / 16}
    assert counts.record(exchanges, "cpu") == expected | {"ms": 1250, "wait_ms": 750, "bytes": 330}
    nothing = _traffic(1, exchanges[:2], torch.device("cpu"))[0]
    assert nothing["bytes"] == 0


def _layer(load: list[float], dropped: float, layer: int = 0) -> dict:
    return {"layer": layer, "load_all": load, "dropped_fraction": {"calm": 0.0, "wild": dropped}}


def test_a_warning_is_given_once_while_its_cause_lasts():
    warnings = Warnings(TelemetryConfig())  # an expert of four starves below 2.5 %, a domain loses above 10 %
    healthy, starving = _layer([0.25, 0.25, 0.25, 0.25], 0.1), _layer([0.5, 0.026, 0.464, 0.01], 0.2)
    assert warnings.check(10, [healthy, healthy]) == []
    starved, dropped = warnings.check(20, [healthy, {**starving, "layer": 1}])
    assert starved.startswith("warning: step 20, layer 1: expert 3 gets 1.00% of the tokens, an even share is 25.0%; ")
    assert "expert 1" not in starved
    assert "model.moe.router.balance_weight" in starved
    assert dropped.startswith("warning: step 20, layer 1: no room at their expert for 20.0% of wild tokens; ")
    assert "calm" not in dropped
    assert "model.moe.capacity_factor" in dropped
    assert "model.moe.dropless=true" in dropped
    assert warnings.check(30, [healthy, {**starving, "layer": 1}]) == []
    worse = _layer([0.6, 0.0, 0.4, 0.0], 0.3, layer=1)
    (another,) = warnings.check(40, [healthy, worse])  # another expert of the same layer
    assert "expert 1" in another
    assert "expert 3" not in another
    assert warnings.check(50, [healthy, {**healthy, "layer": 1}]) == []
    assert len(warnings.check(60, [healthy, worse])) == 2
    assert warnings.check(70, [_layer([0.0] * 4, 0.0)]) == []  # nothing was counted


def _record(step: int, load: list[float]) -> dict:
    layer = {
        "layer": 0, "load": {"calm": load, "wild": load[::-1]}, "load_all": load, "dropped_fraction": {"calm": 0.25},
        "entropy": {"calm": 0.5}, "mean_gate": {"calm": 0.75}, "largest_logit": 9.0, "temperature": None,
        "expert_grad_norm": [1.0] * len(load), "all_to_all": {"ms": 4.0, "wait_ms": 2.0, "bytes": 512.0},
    }  # fmt: skip
    return {"kind": "train", "step": step, "loss": 0.5, "routing": [layer]}


def _events(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    return events.Reload()


def test_metrics_jsonl_and_tensorboard_get_every_number(tmp_path):
    log = Log(tmp_path, 0)
    log.write(_record(10, [0.25, 0.75]))
    log.write({"kind": "valid", "step": 10, "latent_mse": {"calm": math.nan, "wild": 0.125}})
    log.close()
    train, valid = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert train == _record(10, [0.25, 0.75])
    assert valid["latent_mse"] == {"calm": None, "wild": 0.125}
    events = _events(tmp_path)
    values = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert values == {
        "train/loss": 0.5,
        "valid/latent_mse/wild": 0.125,
        **{f"routing_load/layer_0/calm/expert_{e}": v for e, v in enumerate((0.25, 0.75))},
        **{f"routing_load/layer_0/wild/expert_{e}": v for e, v in enumerate((0.75, 0.25))},
        **{f"routing_load_all/layer_0/expert_{e}": v for e, v in enumerate((0.25, 0.75))},
        "routing_dropped/layer_0/calm": 0.25,
        "routing_entropy/layer_0/calm": 0.5,
        "routing_mean_gate/layer_0/calm": 0.75,
        "routing_largest_logit/layer_0": 9,
        "routing_expert_grad_norm/layer_0/expert_0": 1,
        "routing_expert_grad_norm/layer_0/expert_1": 1,
        "routing_all_to_all/layer_0/ms": 4,
        "routing_all_to_all/layer_0/wait_ms": 2,
        "routing_all_to_all/layer_0/bytes": 512,
    }
    assert events.Tags()["images"] == ["routing_load_map/layer_0/calm", "routing_load_map/layer_0/wild"]


def test_many_experts_become_two_scalars(tmp_path):
    log = Log(tmp_path, 0)
    log.write(_record(10, [n / 190 for n in range(20)]))
    log.close()
    tags = [tag for tag in _events(tmp_path).Tags()["scalars"] if tag.startswith("routing_load/layer_0/calm")]
    assert sorted(tags) == ["routing_load/layer_0/calm/largest", "routing_load/layer_0/calm/smallest"]


def test_load_maps_are_drawn_periodically_and_continue_after_a_crash(tmp_path, monkeypatch):
    monkeypatch.setattr(sender, "RECORDS_PER_MAP", 3)
    log = Log(tmp_path, 0)
    for step in range(1, 6):
        log.write(_record(step, [0.5, 0.5]))
    # Killed here; the last checkpoint was of step 4.
    log = Log(tmp_path, 4)
    log.write(_record(5, [0.5, 0.5]))
    log.close()
    events = _events(tmp_path)
    assert [(image.step, image.width) for image in events.Images("routing_load_map/layer_0/calm")] == [(3, 6), (5, 10)]
    assert [loss.step for loss in events.Scalars("train/loss")] == [1, 2, 3, 4, 5]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_a_load_map_shows_experts_over_time():
    maps = LoadMaps()
    for load in ([0.0, 1.0], [0.5, 0.5]):
        maps.add(_record(0, load)["routing"])
    image = maps.images()["layer_0/calm"]
    assert image.dtype == np.uint8
    height, width, _ = image.shape
    top, bottom = image[0], image[-1]
    assert tuple(top[0]) == STARVED  # expert 0, first record
    assert bottom[0, 0] > bottom[0, 2]  # expert 1 gets all tokens: red
    assert tuple(top[-1]) == tuple(bottom[-1]) == EVEN
    assert (height, width) == (128, 4)


def test_the_load_map_of_a_long_run_stays_short():
    maps = LoadMaps()
    records = 5 * COLUMNS + 3
    for number in range(records):
        share = number / records
        maps.add(_record(number, [share, 1 - share])["routing"])
        assert len(maps.columns) < COLUMNS
    assert len(maps.columns) >= COLUMNS // 2
    means = [column[0, 0, 0] for column in maps.columns]
    assert means == sorted(means)
    assert means[0] < 0.01
    assert means[-1] > 0.98
    assert maps.images()["layer_0/calm"].shape[1] < 2 * COLUMNS
