"""The arms differ only in the settings that their names state."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from shodh_moe.audit.arms import (
    SET_ARMS,
    all_runs,
    arm_config,
    set_runs,
    shared_config,
    tuning_runs,
    unseen_config,
    with_all_domains,
)
from shodh_moe.audit.config import AuditConfig
from shodh_moe.cli import main as shodh
from shodh_moe.config.compare import differing_keys
from shodh_moe.config.load import load_config_of
from shodh_moe.config.paths import resolve_paths
from shodh_moe.data.sampler import DomainSampler, domain_weights
from shodh_moe.runs.checks import check
from shodh_moe.runs.plan import count_parameters
from tests.audit.tiny import audit, tree

WAKE = {"trajectories": {"train": 1, "valid": 1, "test": 1}}


def _parameters(tmp_path, arm):
    return count_parameters(
        arm_config(audit(tmp_path), "main", arm, 0, 1e-3, domain="open_channel" if arm == "single" else None), 1
    )


def test_parameters_of_the_arms(tmp_path):
    moe = _parameters(tmp_path, "moe")
    # A projection of the 97 features to the router's 16, two prototypes of 16, one temperature.
    features = 2 * 3 * 16 + 1
    router, prototype = 16 * features + 2 * 16 + 1, 16
    embedding, head, expert = 3 * 16 * 24, 24 * 16, 3 * 24 * 16
    assert moe.total - moe.active == embedding + head + expert
    for arm in ("dense_active", "single"):
        dense = _parameters(tmp_path, arm)
        assert dense.total == dense.active == moe.active - prototype
    for arm in ("dense_total", "dense_wide"):
        dense = _parameters(tmp_path, arm)
        assert dense.active == dense.total == pytest.approx(moe.total, rel=0.1)  # tiny networks have few sizes
    oracle = _parameters(tmp_path, "oracle")
    assert (oracle.total, oracle.active) == (moe.total - router, moe.active - router)
    for arm in ("random", "random_start", "shared_attention"):
        assert _parameters(tmp_path, arm) == moe
    alone = _parameters(tmp_path, "no_shared")
    assert alone.active == moe.active - embedding - head


def test_dense_networks_are_as_large_as_the_mixture_at_the_shipped_size():
    one = load_config_of(AuditConfig, Path(__file__).parents[2] / "configs" / "audit" / "cpu.yaml")
    sizes = {arm: count_parameters(arm_config(one, "main", arm, 0, 1e-3), 1) for arm in SET_ARMS["main"][:5]}
    for arm in ("dense_total", "dense_wide"):
        assert sizes[arm].active == sizes[arm].total == pytest.approx(sizes["moe"].total, rel=0.03)
    assert sizes["dense_active"].total == pytest.approx(sizes["moe"].active, rel=0.001)


def test_a_control_differs_from_the_mixture_only_in_its_own_settings(tmp_path):
    one = audit(tmp_path)
    moe = arm_config(one, "main", "moe", 0, 1e-3).model_dump()
    router = "model.moe.router."
    expected = {
        "moe": set(),
        "layer": {"model.moe.scope"},
        "dense_active": {"model.moe.num_experts"},
        "dense_total": {"model.moe.num_experts", "model.moe.expert_hidden"},
        "dense_wide": {"model.moe.num_experts", "model.moe.expert_hidden", "model.dim"},
        "film": {"model.moe.num_experts", "model.film"},
        "oracle": {router + "kind"},
        "random": {router + "frozen", router + "start"},
        "random_start": {router + "start"},
        "no_shared": {"model.moe.shared_experts", "model.moe.expert_hidden", "model.moe.shared_linear"},
        "shared_expert": {"model.moe.shared_experts", "model.moe.expert_hidden"},
        "shared_attention": set(),  # as the tiny base has it
    }
    assert {*expected, "single"} == set(SET_ARMS["main"])
    for arm, keys in expected.items():
        differing = set(differing_keys(moe, arm_config(one, "main", arm, 0, 1e-3).model_dump()))
        assert differing - {"name"} == keys, arm


def test_a_single_domain_run_sees_the_joint_runs_samples_of_the_domain(tmp_path):
    one, everyone, sizes = audit(tmp_path), ["decaying_turbulence", "open_channel", "porous_media"], (7, 11, 13)

    def seen(config, steps=9):
        given = domain_weights(config.data.weights, everyone)
        used = [n for n, weight in enumerate(given) if weight]
        sampler = DomainSampler(
            tuple(sizes[n] for n in used),
            config.training.batch_size,
            config.seed,
            1,
            tuple(given[n] for n in used),
            tuple(used),
        )
        picks = [(used[domain], index) for step in range(steps) for domain, index in sampler.batch(step, 0)]
        return {everyone[n]: [index for domain, index in picks if domain == n] for n in used}

    joint = seen(arm_config(one, "main", "dense_active", 5, 1e-3))
    assert set(joint) == {"open_channel", "porous_media"}
    for domain, order in joint.items():
        assert len(order) == 27
        assert seen(arm_config(one, "main", "single", 5, 1e-3, domain=domain)) == {domain: order}


def test_all_runs_have_the_same_tokenizer_and_latents(tmp_path):
    one = audit(tmp_path, hard=["open_channel", "decaying_turbulence"], experts=[2, 3])
    (resolve_paths(one.base).tokenizer).mkdir(parents=True)
    rates = dict.fromkeys(tuning_runs(one), 1e-3)
    assert {resolve_paths(run.config).latents for run in all_runs(one, rates)} == {
        resolve_paths(shared_config(one)).latents
    }
    assert resolve_paths(unseen_config(one)).latents != resolve_paths(shared_config(one)).latents


def test_only_identical_runs_share_a_folder(tmp_path):
    one = audit(tmp_path, hard=["open_channel", "decaying_turbulence"])
    rates = dict.fromkeys(tuning_runs(one), 1e-3)
    main, hard = ({(r.arm, *r.domains): r.name for r in set_runs(one, s, [0], rates)} for s in ("main", "hard"))
    assert main["single", "open_channel"] == hard["single", "open_channel"]
    assert len(set(main.values()) | set(hard.values())) == len(main) + len(hard) - 1
    changed = audit(tmp_path, probes=4)
    assert arm_config(changed, "main", "moe", 0, 1e-3).name != main["moe", "open_channel", "porous_media"]


def test_an_arm_has_the_same_rate_in_every_set(tmp_path):
    one = audit(tmp_path, hard=["open_channel", "decaying_turbulence"], experts=[2, 4])
    rates = {name: 1e-3 * (n + 1) for n, name in enumerate(tuning_runs(one))}
    for run in all_runs(one, rates):
        like = {"single": "single:open_channel", "dense_total": "dense_active", "dense_wide": "dense_active"}
        known = run.tuned_as if run.tuned_as in rates else like.get(run.arm, "moe")
        assert run.config.training.learning_rate == rates[known]
    four = {(r.arm, r.experts) for r in set_runs(one, "four", [0], rates)}
    assert four == {("moe", 2), ("moe", 4), ("dense_active", 0), ("oracle", 3), ("single", 0)}
    bed = audit(tmp_path, bed=["open_channel", "porous_media", "decaying_turbulence"])
    own = {(r.arm, r.config.training.learning_rate) for r in set_runs(bed, "bed", [0], rates)}
    assert {("window", rates["moe"]), ("both", rates["moe"])} < own


def test_rates_are_chosen_for_the_mixture_and_its_rivals_only(tmp_path):
    rivals = {"moe", "layer", "dense_active", "film"}
    assert set(tuning_runs(audit(tmp_path))) == rivals | {"single:open_channel", "single:porous_media"}


def test_the_shipped_audit_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the repository may hold a run named quickstart
    one = load_config_of(AuditConfig, Path(__file__).parents[2] / "configs" / "audit" / "cpu.yaml")
    runs = all_runs(one, dict.fromkeys(tuning_runs(one), 1e-3))
    counts = [sum(run.set == name for run in runs) for name in ("main", "long", "hard", "four", "bed")]
    assert counts == [50, 12, 12, 27, 21]
    assert {run.config.training.steps for run in runs if run.set == "long"} == {1500}
    assert {run.config.training.steps for run in runs if run.set != "long"} == {600}
    data = with_all_domains(one, one.base)
    check(data, resolve_paths(data))
    assert len({run.name for run in runs}) == 119  # `hard` has three single-domain runs of `main`
    assert {run.domains[0] for run in runs if run.set == "four" and run.arm == "single"} == {
        "decaying_turbulence", "obstacle_wake", "open_channel", "porous_media",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": [0, 0]}, "seeds [0, 0] must be one or more different numbers"),
        ({"learning_rates": [1e-3, 5e-4]}, "increasing order"),
        ({"more_seeds": [3]}, "3 is not among seeds"),
        ({"tuning_seeds": [0]}, "tuning_seeds: 0 is also among seeds"),
        ({"domains": ["open_channel", "ocean"]}, "has decaying_turbulence, open_channel, porous_media but not ocean"),
        ({"domains": ["open_channel"]}, "must be two different domains"),
        ({"hard": ["open_channel", "obstacle_wake"]}, "but not obstacle_wake"),
        ({"third": "porous_media"}, "new to the networks"),
        ({"experts": [1, 2]}, "must be different numbers, at least 2"),
        ({"base.data.weights": {"open_channel": 2.0}}, "base.data.weights must be null"),
        ({"base.training.batch_size": 4}, "not divisible by 3 domains"),
        ({"base.model.moe.scope": "layer"}, "must be the mixture that the other arms are derived from"),
        ({"bed": ["open_channel", "decaying_turbulence"]}, "must be the main domains"),
        ({"base.model.moe.shared_linear": False}, "must be the mixture that the other arms are derived from"),
        ({"base.model.strides": [2]}, "base.model.strides must begin with 1"),
        ({"unseen.porous_media": None}, "unseen has no porous_media"),
        ({"unseen.open_channel.bed": ["spheres"]}, "give it another geometry"),
        ({"unseen.obstacle_wake": WAKE}, "base.data.domains has no obstacle_wake"),
    ],
)
def test_wrong_settings_are_named(tmp_path, capfd, change, words):
    path = tmp_path / "audit.yaml"
    path.write_text(yaml.safe_dump(tree(tmp_path)))
    overrides = [
        f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}" for key, value in change.items()
    ]
    assert shodh(["audit", "--config", str(path), *overrides]) == 2
    assert words in capfd.readouterr().err
