"""Predicted steps: properties, the shipped configs, and what a machine file or a layout may not be."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.config import Config
from shodh_moe.config.load import load_config
from shodh_moe.plan.hardware import GPUS, NETWORKS, gpu_named, network_named
from shodh_moe.plan.layouts import StepLayout, compare, layouts, reason, with_global_batch
from shodh_moe.plan.machine import (
    ASSUMED,
    Curve,
    Link,
    Machine,
    from_data_sheets,
    read_machine,
    with_network,
    write_machine,
)
from shodh_moe.plan.operations import Cost
from shodh_moe.plan.predict import predict, seconds
from shodh_moe.plan.table import layout_table, time_table

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NODES = with_network(from_data_sheets("h100"), "ib-ndr")


def cluster(*overrides: str) -> Config:
    return load_config(CONFIGS / "cluster_8x8.yaml", list(overrides))


def measured(machine: Machine = NODES) -> Machine:
    """The same rates on a machine that computes when the host tells it, as a CPU does."""
    return machine.model_copy(update={"device": "cpu", "source": "measured"})


def test_the_time_of_an_operation_by_hand():
    """989.4 TFLOP/s at 60 %; 3.35 TB/s at 85 %."""
    rates = NODES.ranks[1]
    product = Cost(flops=1e12, bytes=1e6, calls=1)
    assert seconds(product, "product", False, rates, "bfloat16", True) == pytest.approx(1 / 593.64)
    copy = Cost(bytes=1e9, calls=1)
    assert seconds(copy, "memory", False, rates, "bfloat16", True) == pytest.approx(1e9 / 2.8475e12)
    narrow = Cost(flops=1e6, bytes=1e9, calls=1)  # limited by memory
    assert seconds(narrow, "product", False, rates, "bfloat16", True) == pytest.approx(1e9 / 2.8475e12)


def test_a_rate_between_two_sizes():
    curve = Curve(points=[(1.0, 10.0), (100.0, 1000.0)])
    assert [curve.at(size) for size in (0.1, 1, 10, 100, 1e6)] == pytest.approx([10, 10, 100, 1000, 1000])
    with pytest.raises(ValueError, match="must increase"):
        Curve(points=[(2.0, 1.0), (1.0, 1.0)])


def test_parts_add_up_and_one_rank_exchanges_nothing():
    found = predict(load_config(CONFIGS / "one_gpu.yaml", []), 1, NODES)
    assert sum(found.parts.values()) == pytest.approx(found.step)
    assert found.exchanges == 0
    assert found.exchanged == []
    assert found.tokens == 64 * 512


def test_without_expert_parallelism_no_rank_exchanges_samples_or_tokens():
    found = predict(cluster("parallel.ep_size=1"), 64, NODES)
    assert not any(one.row.why in ("samples", "tokens", "numbers of tokens") for one in found.exchanged)
    assert any("samples" in name for name in predict(cluster(), 64, NODES).parts)


def faster(part: str) -> Machine:
    rates = NODES.ranks[1]
    if part == "network":
        assert NODES.network is not None
        return NODES.model_copy(update={"network": Link(hop=NODES.network.hop, rate=2 * NODES.network.rate)})
    if part == "links":
        links = {kind: Link(hop=link.hop, rate=2 * link.rate) for kind, link in rates.links.items()}
        return NODES.model_copy(update={"ranks": {1: rates.model_copy(update={"links": links})}})
    if part == "operation":
        return NODES.model_copy(update={"ranks": {1: rates.model_copy(update={part: rates.operation / 2})}})
    curve = Curve(points=[(1.0, 2 * rates.memory.at(1))])
    return NODES.model_copy(update={"ranks": {1: rates.model_copy(update={part: curve})}})


@pytest.mark.parametrize("part", ["network", "links", "operation", "memory"])
@pytest.mark.parametrize("exchange", ["sample", "token"])
def test_a_faster_machine_is_never_slower(part, exchange):
    config = cluster(f"parallel.exchange={exchange}")
    assert predict(config, 64, faster(part)).step <= predict(config, 64, NODES).step


def test_on_a_cpu_operations_take_their_time_one_after_the_other():
    config = load_config(CONFIGS / "one_gpu.yaml", [])
    ahead, one_by_one = predict(config, 1, NODES), predict(config, 1, measured())
    assert "launching" in ahead.compute
    assert "launching" not in one_by_one.compute
    assert one_by_one.step > ahead.step


def test_gradients_overlap_only_if_deepspeed_is_told_to_and_on_a_gpu():
    plain, overlapped = cluster(), cluster("deepspeed.zero_optimization.overlap_comm=true")

    def exposed(config: Config, machine: Machine) -> float:
        return sum(one.exposed for one in predict(config, 64, machine).exchanged if one.row.why == "gradients")

    assert exposed(overlapped, NODES) < 0.5 * exposed(plain, NODES)
    assert exposed(overlapped, measured()) > 0.99 * exposed(plain, measured())


def test_checkpointing_costs_time_and_saves_memory():
    kept, again = (predict(cluster(f"training.activation_checkpointing={on}"), 64, NODES) for on in ("false", "true"))
    assert kept.step < again.step < 1.5 * kept.step
    assert again.memory < 0.5 * kept.memory


@pytest.mark.parametrize("name", ["one_gpu", "pretrain_1gpu", "node_8gpu", "cluster_8x8"])
def test_a_shipped_config_is_planned_in_a_second(name):
    config, world = load_config(CONFIGS / f"{name}.yaml", []), {"node_8gpu": 8, "cluster_8x8": 1024}.get(name, 1)
    compare(config, world, NODES)  # imports, and networks that are built once
    began = time.process_time()
    found = compare(config, world, NODES)
    assert time.process_time() - began < 1.0
    steps = [choice.prediction.step for choice in found.choices]
    assert steps == sorted(steps)
    assert steps[0] <= found.configured.prediction.step
    text = layout_table(found, NODES, world)
    assert found.choices[0].layout.settings in text
    assert "not measured" in time_table(config, world, NODES, found.choices[0].prediction)


def test_layouts_make_the_same_step_and_mix_the_domains():
    found = list(layouts(cluster(), 64))
    assert {one.ep for one in found} == {1, 2, 4, 8}
    assert {(one.micro_batch, one.accumulation) for one in found} == {(4, 1), (2, 2)}  # 1 would hold one of two domains
    assert {one.exchange for one in found if one.ep == 1} == {"none"}
    assert {one.exchange for one in found if one.ep == 8} == {"sample", "token"}
    assert len(found) == len(set(found))


def test_the_settings_of_a_layout_are_overrides_that_give_it():
    for layout in layouts(cluster(), 64):
        assert StepLayout.of(cluster(*layout.settings.split()), 64) == layout
        assert StepLayout.of(layout.applied_to(cluster()), 64) == layout


def test_reasons_name_what_limits_and_what_is_slower():
    found = compare(cluster(), 64, NODES)
    assert reason(found.choices[0], found.choices[0]).startswith("limited by ")
    assert "% slower: " in reason(found.choices[-1], found.choices[0])


def test_a_global_batch_is_divided_among_the_ranks():
    config = with_global_batch(cluster(), 64, 256)
    assert (config.training.batch_size, config.training.accumulation) == (4, 1)
    with pytest.raises(UserError, match=r"--world 48 cannot share --global-batch 256 .* are 32 or 64"):
        with_global_batch(cluster(), 48, 256)
    with pytest.raises(UserError, match="are 128"):  # 256 ranks would have one sample each, of two domains
        with_global_batch(cluster(), 256, 256)
    for wrong in (0, -1, 7):
        with pytest.raises(UserError, match=f"--global-batch {wrong}"):
            with_global_batch(cluster(), 7, wrong)


def test_a_network_that_fits_no_rank_is_refused_with_the_nearest_gpu():
    wide = ["model.dim=6144", "model.heads=48", "model.moe.expert_hidden=24576"]
    large = load_config(CONFIGS / "node_8gpu.yaml", wide)
    with pytest.raises(UserError, match=r"no layout of 8 ranks fits h100.* the nearest that fits is --gpu b200"):
        compare(large, 8, NODES)
    with pytest.raises(UserError, match="no known GPU has as much"):
        compare(cluster("model.dim=16384", "model.heads=64", "model.moe.expert_hidden=65536"), 8, NODES)


def test_gpus_and_networks_by_name():
    assert gpu_named("H100") is GPUS["h100"]
    with pytest.raises(UserError, match=r"--gpu h10 is not known: the nearest is h100; known are b200, h100"):
        gpu_named("h10")
    with pytest.raises(UserError, match=r"--network ib-nrd is not known: the nearest is ib-ndr"):
        network_named("ib-nrd")
    for gpu in GPUS:
        for network in NETWORKS:
            predict(cluster(), 16, with_network(from_data_sheets(gpu), network))
    assert from_data_sheets("h100").memory == 80e9 - ASSUMED.reserved


def test_a_machine_file_is_read_as_it_was_written(tmp_path):
    write_machine(tmp_path / "machine.json", NODES)
    assert read_machine(tmp_path / "machine.json") == NODES


DAMAGES = {
    "not JSON": lambda tree: "{",
    "another version": lambda tree: json.dumps({**tree, "format": 2}),
    "a negative rate": lambda tree: json.dumps({**tree, "network": {"hop": 0, "rate": -1}}),
    "no rates": lambda tree: json.dumps({**tree, "ranks": {}}),
    "infinity": lambda tree: json.dumps({**tree, "memory": float("inf")}),
    "an unknown key": lambda tree: json.dumps({**tree, "speed": 3}),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_machine_file_is_refused_in_one_line(tmp_path, damage):
    path = tmp_path / "machine.json"
    path.write_text(damage(NODES.model_dump()))
    with pytest.raises(UserError, match=r"machine.json is damaged .*shodh plan --measure") as caught:
        read_machine(path)
    assert "\n" not in str(caught.value)


def test_a_missing_machine_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.json cannot be read"):
        read_machine(tmp_path / "nowhere.json")


def test_a_dtype_that_was_not_measured_is_named():
    rates = NODES.ranks[1]
    products = {"float32": rates.products["float32"]}
    machine = NODES.model_copy(update={"ranks": {1: rates.model_copy(update={"products": products})}})
    with pytest.raises(UserError, match=r"no rate of products in bfloat16: .*--dtypes bfloat16"):
        predict(cluster(), 8, machine)


def test_rates_are_those_of_as_many_busy_ranks():
    rates = NODES.ranks[1]
    machine = NODES.model_copy(update={"ranks": {1: rates, 4: rates.model_copy(update={"step": 9.0})}})
    assert [machine.rates(world).step == 9.0 for world in (1, 2, 4, 8, 64)] == [False, False, True, True, True]
