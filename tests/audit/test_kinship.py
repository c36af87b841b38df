"""Which domains share experts, and what experts say about the place in a sample."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from shodh_moe.audit import place
from shodh_moe.audit.kinship import distances, groups, growth_on_experts
from shodh_moe.audit.place import BED, STREAM, bed_tokens, place_information
from shodh_moe.audit.routing import heldout_routing
from shodh_moe.tokenizer.latents import LatentSamples, load_latents
from tests import tiny
from tests.audit.tiny import make_transformer
from tests.training.synthetic import write_latents

DOMAINS = ["open_channel", "porous_media"]


@pytest.fixture
def test_split(tmp_path):
    write_latents(tmp_path)
    return load_latents(tmp_path, "test")


def _transformer(**router):
    moe = {"num_experts": 3, "expert_hidden": 8, "scope": "path", "router": {"kind": "oracle", **router}}
    config = tiny.config(model={"dim": 16, "depth": 2, "heads": 2, "moe": moe}, evaluation={"batch_size": 3})
    transformer = make_transformer(config)
    torch.nn.init.normal_(transformer.head.routed_EIO, std=0.3)
    return config, transformer


def test_an_error_grows_by_the_exchange_of_experts_and_weights_are_restored(test_split):
    config, transformer = _transformer()
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    samples = LatentSamples(test_split, 2)
    growth = growth_on_experts(transformer, samples, heldout_routing(transformer, test_split, None, config), 3)
    assert growth["open_channel"][0] == growth["porous_media"][1] == 1.0
    assert len({round(value, 6) for values in growth.values() for value in values}) == 5
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())
    assert growth_on_experts(transformer, samples, None, 3) is None


def test_domains_that_share_an_expert_are_at_distance_0():
    majority = {"a": 2, "b": 0, "c": 2}
    growth = {"a": [4.0, 9.0, 1.0], "b": [1.0, 9.0, 16.0], "c": [0.9, 9.0, 1.0]}
    assert groups(majority) == [["a", "c"], ["b"]]
    near, far = math.log(8), math.log(4)  # (ln 4 + ln 16) / 2 and (ln 1 + ln 16) / 2
    assert distances(growth, majority) == [[0, pytest.approx(near), 0], [near, 0, far], [0, far, 0]]


def test_the_place_of_tokens_follows_the_height_of_the_bed(test_split, monkeypatch):
    heights = {"open_channel_0.hdf5": {}, "porous_media_0.hdf5": {"bed_height": 8}}
    monkeypatch.setattr(place, "read_provenance", lambda path: {"parameters": heights[path.name]})
    channel, porous = ({one.domain: one for one in test_split}[domain] for domain in DOMAINS)

    class Record:
        def __init__(self, path):
            self.path = path

    records = {(one.source, one.sample): Record(Path(one.source)) for one in test_split}
    assert bed_tokens(channel, records[channel.source, 0], 1) is None
    bed_S = bed_tokens(porous, records[porous.source, 0], 1)  # 2 x 2 x 2 tokens of 8 cells; floor and 8 cells of bed
    assert bed_S.tolist() == [BED, STREAM] * 4
    _, transformer = _transformer()
    found = place_information(transformer, LatentSamples(test_split, 2), records, 3)
    assert list(found) == ["porous_media"]
    assert found["porous_media"]["entropy"] == pytest.approx([math.log(2)] * 2)
    assert found["porous_media"]["information"] == pytest.approx([0, 0])  # the oracle sends all tokens to one expert
