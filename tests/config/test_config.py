"""Reading configs from files and overrides, messages about mistakes, and comparing configs."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from shodh_moe.audit.config import AuditConfig
from shodh_moe.base.errors import UserError
from shodh_moe.base.section import Section
from shodh_moe.ccm.bench.config import BenchConfig
from shodh_moe.ccm.config import ExpertConfig
from shodh_moe.config import Config
from shodh_moe.config.compare import differing_keys, differing_model_keys, fingerprint
from shodh_moe.config.load import load_config, load_config_of
from shodh_moe.training.deepspeed_config import exchanges_samples
from tests.tiny import CONFIG, write_config

ROOT = Path(__file__).resolve().parents[2]


def written(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_states_only_what_differs_from_the_defaults(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "training:\n  learning_rate: 3e-4\n"))
    assert config.training.learning_rate == 3e-4
    assert config.model_dump() == Config(training={"learning_rate": 3e-4}).model_dump()
    assert load_config(written(tmp_path, "")) == Config()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    assert load_config(path).name


def test_overrides_replace_the_files_values_and_the_name_comes_last(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    overrides = ["training.learning_rate=1e-2", "data.grid=[8, 16, 24]", "data.domains.open_channel=null", "name=a"]
    config = load_config(path, [*overrides, "deepspeed.wall_clock_breakdown=true"], "b")
    assert config.training.learning_rate == 1e-2
    assert config.data.grid == [8, 16, 24]
    assert [name for name, _ in config.data.domains.items()] == ["porous_media"]
    assert config.deepspeed == {"wall_clock_breakdown": True}
    assert config.name == "b"
    assert config.training.steps == CONFIG["training"]["steps"]


def test_a_stored_config_is_read_back_unchanged(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path), ["training.learning_rate=1e-5"])
    assert load_config(written(tmp_path, yaml.safe_dump(config.model_dump()))) == config


def test_a_stored_config_of_an_older_version_keeps_its_meaning(tmp_path: Path) -> None:
    """Before these keys existed, there was a router in each layer, no norm after a branch, and the loss was the MSE."""
    tree = Config().model_dump()
    for key in ("scope", "attention", "attention_rank", "shared_linear"):
        del tree["model"]["moe"][key]
    del tree["model"]["moe"]["router"]["commitment_weight"], tree["model"]["norms"], tree["training"]["loss"]
    tree["model"]["moe"]["router"]["lr_scale"] = 1.0
    path = written(tmp_path, yaml.safe_dump(tree))
    old = load_config_of(Config, path, stored=True)
    assert (old.model.moe.scope, old.model.moe.attention) == ("layer", "shared")
    assert old.model.moe.router.commitment_weight == 0
    assert (old.model.norms, old.training.loss) == ("pre", "mse")
    assert "moe.scope" in differing_model_keys(tree["model"], Config().model.model_dump())
    # In a file that a user writes, keys that are left out have today's defaults.
    assert load_config(path).model.moe.scope == "path"


def test_scope_layer_has_defaults_of_its_own(tmp_path: Path) -> None:
    moe = load_config(written(tmp_path, "model: {moe: {scope: layer}}")).model.moe
    assert (moe.attention, moe.router.lr_scale, moe.router.commitment_weight) == ("shared", 1.0, 0.0)
    given = load_config(written(tmp_path, "model: {moe: {scope: layer, router: {lr_scale: 0.1}}}")).model.moe
    assert given.router.lr_scale == 0.1


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("traning.steps=3", "training"),
        ("training.stpes=3", "training.steps"),
        ("data.domains.porous_medium.grain=3", "data.domains.porous_media"),
        ("data.domains.open_channel.viscocity=1", "data.domains.open_channel.viscosity"),
        ("data.domains.open_channel.trajectories.tests=1", "data.domains.open_channel.trajectories.test"),
        ("model.moe.router.temprature=1", "model.moe.router.temperature"),
        ("num_experts=4", "model.moe.num_experts"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, override: str, nearest: str) -> None:
    path = write_config(tmp_path)
    with pytest.raises(UserError) as error:
        load_config(path, [override])
    assert f"override {override!r}: unknown key" in str(error.value)
    assert str(error.value).endswith(f"nearest valid key is {nearest!r}")


def test_an_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "model:\n  moe:\n    num_expert: 2\n")
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value) == (
        f"{path}: unknown key 'model.moe.num_expert'; the nearest valid key is 'model.moe.num_experts'"
    )


def test_a_key_without_a_similar_one_names_the_sections(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key 'zzz'; the sections are name, seed, .*training"):
        load_config(write_config(tmp_path), ["zzz=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=abc", "training.steps should be a valid integer, not 'abc'"),
        ("training.steps=1.5", "training.steps should be a valid integer, not 1.5"),
        ("training.steps=true", "training.steps should be a valid integer, not True"),
        ("training.steps=", "training.steps should be a valid integer, not None"),
        ("training.steps=0", "training.steps should be greater than 0, not 0"),
        ("training.learning_rate=.inf", "training.learning_rate should be a finite number, not inf"),
        ("training.learning_rate=.nan", "training.learning_rate should be"),
        ("training.betas=[0.9]", "betas needs two numbers"),
        ("parallel.processes=four", "parallel.processes should be a valid integer or 'auto', not 'four'"),
        ("parallel.exchange=tokens", "parallel.exchange should be 'sample', 'token' or 'auto', not 'tokens'"),
        ("parallel.exchange_capacity=0.9", "parallel.exchange_capacity should be greater than or equal to 1, not 0.9"),
        ("parallel.ep_size=-1", "parallel.ep_size should be greater than 0 or 'auto', not -1"),
        ("data.grid=32", "data.grid should be a valid list, not 32"),
        ("data.grid=[16, a, 16]", "data.grid.1 should be a valid integer, not 'a'"),
        ("data.grid=[16, 16]", "grid needs three sizes"),
        ("data.grid=[16, 20, 16]", "grid [16, 20, 16] is not divisible by the tokenizer's compression 8"),
        ("data.domains.open_channel=5", "data.domains.open_channel should be a section of `key: value` lines, not 5"),
        ("deepspeed=3", "deepspeed should be a section"),
        (
            "tokenizer.operator=upwind",
            "tokenizer.operator should be 'spectral', 'central2', 'central4' or 'staggered', not 'upwind'",
        ),
        ("tokenizer.latent_channels=4096", "tokenizer.latent_channels should be less than or equal to 2048"),
        ("model.dim=25", "dim 25 must divide into 2 heads"),
        ("model.moe.top_k=3", "top_k 3 is more than num_experts 2"),
        ("model.moe.top_k=9", "model.moe.top_k should be less than or equal to 8, not 9"),
        ("model.moe={top_k: 2, router: {kind: oracle}}", "router.kind oracle knows one expert for each domain"),
        ("model.moe.router.balance=both", "should be 'loss', 'global' or 'bias', not 'both'"),
        ("model.moe.router={balance: bias, frozen: true}", "would change the decisions of the control frozen true"),
        ("name=5", "name should be a valid string, not 5"),
    ],
)
def test_an_invalid_value_is_explained_in_one_line(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(write_config(tmp_path), [override])
    assert str(error.value).startswith(f"override {override!r}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("model.moe.scope=layer",), "model.moe.scope is layer: set it to path"),
        (("model.moe.scope=path", "model.moe.router.context=window"), "router.context is window: set it to sample"),
        (("model.moe.num_experts=0", "model.moe.shared_experts=1"), "model.moe.num_experts is 0: give it experts"),
        (("model.moe.router.added=[1]",), r"added experts \(model.moe.router.added\): use a model without"),
    ],
)
def test_samples_that_have_no_path_cannot_be_exchanged(tmp_path: Path, settings: tuple[str, ...], reason: str) -> None:
    path = write_config(tmp_path)
    with pytest.raises(UserError, match=f"parallel.exchange sample needs one path for each sample, but .*{reason}, or"):
        load_config(path, [*settings, "parallel.exchange=sample"])
    assert load_config(path, list(settings)).parallel.exchange == "auto"
    assert not exchanges_samples(load_config(path, list(settings)), 2)
    assert exchanges_samples(load_config(path, ["model.moe.scope=path", "parallel.exchange=sample"]), 2)


def test_experts_are_placed_by_load_only_if_all_layers_have_one_router(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    with pytest.raises(UserError, match=r"placement load needs one router for all layers, but .* set it to path, or"):
        load_config(path, ["model.moe.scope=layer", "parallel.placement=load"])
    load_config(path, ["parallel.placement=load"])


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/tmp/x", "a/b", "-x", "~", "a b", "a\n", "x" * 101, ".h"])
def test_a_name_that_would_leave_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    path = write_config(tmp_path)
    with pytest.raises(UserError, match="name should"):
        load_config(path, name=name)
    with pytest.raises(UserError, match=r"data\.name should"):
        load_config(path, [f"data.name={name!r}"])


@pytest.mark.parametrize("name", ["quickstart", "a.b-c_d", "seed=3", "2026-01-01", "lr1e-3+wd"])
def test_ordinary_names_are_accepted(tmp_path: Path, name: str) -> None:
    assert load_config(write_config(tmp_path), name=name).name == name


@pytest.mark.parametrize("override", ["steps", "=3", "", "training.steps: 3"])
def test_an_override_needs_key_and_value(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match=r"must look like key\.sub=value"):
        load_config(write_config(tmp_path), [override])


@pytest.mark.parametrize(
    ("kind", "base", "key"),
    [
        *((Config, "quickstart.yaml", key) for key in ("seed", "data.seed", "tokenizer.seed")),
        *((ExpertConfig, "ccm/reaction_diffusion.yaml", key) for key in ("seed", "family.seed")),
        (AuditConfig, "audit/cpu.yaml", "base.seed"),
        (AuditConfig, "audit/cpu.yaml", "tuning_seeds"),
        (BenchConfig, "ccm/bench.yaml", "seeds"),
    ],
)
def test_a_seed_that_torch_cannot_take_is_refused(kind: type[Section], base: str, key: str) -> None:
    path = ROOT / "configs" / base
    for seed, accepted in ((2**64 - 1, True), (2**64, False), (-1, False)):
        value = f"[{seed}]" if key.endswith("seeds") else seed
        if accepted:
            load_config_of(kind, path, [f"{key}={value}"])
            torch.Generator().manual_seed(seed)
        else:
            with pytest.raises(UserError, match=rf"{key}.* should be (less|greater) than .*, not {seed}"):
                load_config_of(kind, path, [f"{key}={value}"])


def test_an_override_of_bad_yaml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(write_config(tmp_path), ["data.grid=[16"])


@settings(max_examples=50, deadline=None)
@given(key=st.text(max_size=12), value=st.text(max_size=12))
def test_any_override_gives_a_config_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: str
) -> None:
    """No input raises another exception."""
    path = written(tmp_path_factory.getbasetemp(), "")
    with suppress(UserError):
        assert isinstance(load_config(path, [f"{key}={value}"]), Config)


def test_differing_keys_are_dotted_and_sorted() -> None:
    a, b = Config().model_dump(), Config(training={"steps": 7}, model={"moe": {"num_experts": 4}}).model_dump()
    assert differing_keys(a, b) == ["model.moe.num_experts", "training.steps"]
    assert differing_keys(a, a) == []
    without = Config(data={"domains": {"open_channel": None}}).model_dump()
    assert "data.domains.open_channel" in differing_keys(a, without)


def test_a_fingerprint_changes_with_any_part() -> None:
    one = fingerprint({"a": 1, "b": [1, 2]}, "x")
    assert one == fingerprint({"b": [1, 2], "a": 1}, "x")
    assert len({one, fingerprint({"a": 1, "b": [2, 1]}, "x"), fingerprint({"a": 1, "b": [1, 2]}, "y")}) == 3


def test_the_example_of_a_fine_tuning_loads() -> None:
    path = Path(__file__).resolve().parents[2] / "configs" / "finetune" / "low_rank.yaml"
    config = load_config(path)
    assert config.finetune is not None
    assert (config.finetune.train, config.finetune.rank) == ("lora", 8)
    assert Config().finetune is None
