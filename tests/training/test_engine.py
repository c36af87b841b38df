"""The DeepSpeed engine on two real ranks: sharded experts, real gradients, and EP 2 equal to EP 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shodh_moe.base.errors import UserError
from shodh_moe.config import Config
from shodh_moe.config.load import load_config
from shodh_moe.parallel import Layout
from shodh_moe.training.deepspeed_config import INSTEAD, SETTINGS, deepspeed_config, fit_layout, layout_of
from tests.training.launch import launch
from tests.training.synthetic import CONFIG, write_case

pytestmark = pytest.mark.distributed


Runs = dict[tuple[int, int], dict[str, torch.Tensor]]


def _train(folder: Path, *overrides: str) -> Runs:
    """Return everything that the worker wrote with these overrides, by (ep_size, rank)."""
    write_case(folder)
    for ep_size in (1, 2):
        done = launch(2, Path(__file__).with_name("worker_engine.py"), str(folder), str(ep_size), *overrides)
        assert done.returncode == 0, done.stdout + done.stderr
    return {(ep, rank): load_file(folder / f"ep{ep}_rank{rank}.safetensors") for ep in (1, 2) for rank in (0, 1)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return _train(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def dropless_runs(tmp_path_factory) -> Runs:
    return _train(tmp_path_factory.mktemp("dropless"), "model.moe.dropless=true")


def _experts(run: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k: v for k, v in run.items() if k.startswith(prefix) and ".experts." in k}


def test_each_rank_holds_only_its_own_experts(runs):
    """Fails if experts are replicated: both ranks would hold the same two."""
    first, second = _experts(runs[2, 0], "local/"), _experts(runs[2, 1], "local/")
    assert len(first) == 4  # two layers, two weights
    for name, value in first.items():
        assert value.shape[0] == 1
        assert not torch.equal(value, second[name])
    for value in _experts(runs[1, 0], "local/").values():
        assert value.shape[0] == 2


def test_expert_gradients_are_nonzero_and_differ_between_ranks(runs):
    first, second = _experts(runs[2, 0], "grad/"), _experts(runs[2, 1], "grad/")
    for name, value in first.items():
        assert value.abs().max() > 0, name
        assert second[name].abs().max() > 0, name
        assert not torch.allclose(value, second[name])


def test_router_gradients_are_nonzero_and_equal_on_all_ranks(runs):
    names = [name for name in runs[2, 0] if name.startswith("grad/") and ".router." in name]
    assert len(names) == 6  # projection, prototypes, temperature of two layers
    for name in names:
        assert runs[2, 0][name].abs().max() > 0, name
        assert torch.equal(runs[2, 0][name], runs[2, 1][name]), name


def test_ranks_agree_on_everything_but_experts(runs):
    for name, value in runs[2, 0].items():
        if name.startswith("local/") and ".experts." not in name:
            assert torch.equal(value, runs[2, 1][name]), name


def test_capacity_binds_in_this_setting(runs):
    """Otherwise the comparison below would not detect a wrong capacity."""
    assert runs[2, 0]["dropped"].sum() > 0


def test_dropless_drops_nothing_and_ep_2_trains_like_ep_1(dropless_runs):
    assert not any(run["dropped"].any() for run in dropless_runs.values())
    _check_ep_2_equals_ep_1(dropless_runs)


def test_ep_2_trains_like_ep_1(runs):
    _check_ep_2_equals_ep_1(runs)


@pytest.mark.parametrize("context", ["sample", "both"])
def test_paths_with_a_capacity_train_with_ep_2_like_with_ep_1(tmp_path, context):
    """The shared, routed and expert parts of a token's path; ranks that share experts exchange tokens in all layers."""
    path = ("model.moe.scope=path", "model.moe.attention=low_rank", "model.moe.capacity_factor=0.75")
    overrides = (*path, f"model.moe.router.context={context}")
    runs = _train(tmp_path, *overrides)
    _check_ep_2_equals_ep_1(runs)
    assert runs[2, 0]["dropped"].sum() > 0
    for part in ("embed.routed_EIO", "head.routed_EIO", "blocks.0.attention.qkv.widen_EQO"):
        assert (runs[2, 0][f"grad/{part}"].flatten(1).norm(dim=1) > 0).all(), part


def _check_ep_2_equals_ep_1(runs: Runs) -> None:
    """Same losses, dropped tokens, true global norms, expert gradients and weights after three steps."""
    for rank in (0, 1):
        assert torch.equal(runs[1, rank]["dropped"], runs[2, rank]["dropped"])
        torch.testing.assert_close(runs[1, rank]["losses"], runs[2, rank]["losses"], rtol=1e-6, atol=0)
    torch.testing.assert_close(runs[1, 0]["norms"], runs[2, 0]["norms"], rtol=1e-5, atol=0)
    assert torch.equal(runs[2, 0]["norms"], runs[2, 1]["norms"])
    for name, value in runs[1, 0].items():
        if name.startswith(("logical/", "logical_grad/")):
            torch.testing.assert_close(runs[2, 0][name], value, rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_float64_does_not_change_the_global_state_of_deepspeed(tmp_path):
    """In all ZeRO stages, between steps and after an error."""
    write_case(tmp_path)
    done = launch(2, Path(__file__).with_name("worker_float64.py"), str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


def _config(tmp_path: Path, *overrides: str) -> Config:
    (tmp_path / "c.yaml").write_text(CONFIG)
    return load_config(tmp_path / "c.yaml", list(overrides))


@pytest.mark.parametrize(("world", "experts", "expected"), [(2, 2, 2), (4, 6, 2), (1, 2, 1), (8, 4, 4), (3, 2, 1)])
def test_auto_ep_size(tmp_path, world, experts, expected):
    assert layout_of(_config(tmp_path, f"model.moe.num_experts={experts}"), world).ep == expected


def test_impossible_layouts_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"num_experts 3 is not divisible by parallel\.ep_size 2"):
        layout_of(_config(tmp_path, "model.moe.num_experts=3", "parallel.ep_size=2"), 2)
    with pytest.raises(UserError, match="ep_size 2 does not divide the world size 3: set it to 1"):
        layout_of(_config(tmp_path, "parallel.ep_size=2"), 3)
    with pytest.raises(UserError, match=r"context_size 3 does not divide the world size 8: set it to 2, or"):
        layout_of(_config(tmp_path, "parallel.context_size=3"), 8)
    with pytest.raises(UserError, match=r"ep_size 2 does not divide the world size 4 divided by .*context_size 4"):
        layout_of(_config(tmp_path, "parallel.ep_size=2", "parallel.context_size=4"), 4)


def test_experts_are_shared_by_ranks_with_the_same_slab(tmp_path):
    slabs = "parallel.context_size=2"
    assert layout_of(_config(tmp_path, slabs, "model.moe.num_experts=8"), 8) == Layout(8, 4, 2)
    assert layout_of(_config(tmp_path, slabs, "parallel.ep_size=2"), 8) == Layout(8, 2, 2)


@pytest.mark.parametrize(("world", "ep", "cp"), [(16, 4, 4), (8, 2, 4), (6, 1, 2), (12, 1, 4), (7, 1, 1)])
def test_fewer_ranks_get_the_largest_sizes_that_fit(tmp_path, world, ep, cp):
    config = _config(tmp_path, "model.moe.num_experts=4", "parallel.ep_size=4", "parallel.context_size=4")
    fitted = fit_layout(config, world).parallel
    assert (fitted.ep_size, fitted.context_size) == (ep, cp)
    assert layout_of(fit_layout(config, world), world) == Layout(world, ep, cp)


@pytest.mark.parametrize(
    "section",
    [
        "{fp16: true}",
        "{zero_optimization: {stage: 1}}",
        "{zero_optimization: {offload_optimizer: {device: cpu}}}",
        "{bf16: {enabled: true}}",
        "{gradient_clipping: 1.0}",
        "{optimizer: {type: Adam, params: {lr: 0.1}}}",
        "{scheduler: {type: WarmupLR}}",
        "{zero_optimization: 1}",
    ],
)
def test_deepspeed_settings_that_would_break_a_run_are_refused(tmp_path, section):
    with pytest.raises(UserError, match=r"deepspeed\."):
        deepspeed_config(_config(tmp_path, f"deepspeed={section}"), 2)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("{optimizer: {type: Adam}}", "deepspeed.optimizer has no effect here: set training.optimizer, training.lear"),
        ("{scheduler: {}}", "deepspeed.scheduler has no effect here: set training.learning_rate, training.min_lear"),
        ("{activation_checkpointing: {}}", "set training.activation_checkpointing instead"),
        ("{wall_clock_breakdwon: true}", "the nearest is 'wall_clock_breakdown'"),
        ("{optimiser: {}}", "the nearest is 'optimizer'"),
        ("{flops_profiler: {enable: true}}", "deepspeed.flops_profiler.enable is not a key"),
        ("{zero_optimization: {reduce_buket_size: 1}}", "the nearest is 'reduce_bucket_size'"),
        ("{zero_optimization: {offload_param: {}}}", "the supported ones are allgather_bucket_size, "),
        ("{nonsense: 1}", "the supported ones are comet, "),
        ("{1: 1}", "should be a valid string"),
    ],
)
def test_deepspeed_settings_without_effect_are_refused_with_the_key_to_use(tmp_path, section, says):
    with pytest.raises(UserError) as error:
        deepspeed_config(_config(tmp_path, f"deepspeed={section}"), 2)
    assert says in str(error.value)


def test_every_key_of_deepspeed_is_accepted_or_refused_on_purpose():
    """Our table against the keys that DeepSpeed itself reads from its config, and against its sections' classes."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    read = set()

    class Recorded(dict):
        def __contains__(self, key):
            read.add(key)
            return super().__contains__(key)

        def get(self, key, default=None):
            read.add(key)
            return super().get(key, default)

        def keys(self):
            return self

        def __copy__(self):
            return Recorded(self)

    DeepSpeedConfig(Recorded(train_micro_batch_size_per_gpu=1))
    own = SETTINGS.keys() | {key for key in INSTEAD if "." not in key}
    assert own - read <= {"amp", "nebula"}  # older versions of DeepSpeed read these
    # Keys of DeepSpeed that training does not use at all.
    unused = {
        *("autotuning", "compile", "data_efficiency", "dataloader_drop_last", "hybrid_engine", "pipeline"),
        *("seq_parallel_communication_data_type", "tensor_parallel", "vocabulary_size", "weight_quantization"),
        *("compression_training", "curriculum_learning", "eigenvalue", "elasticity", "graph_harvesting"),
        *("progressive_layer_drop", "quantize_training", "sparse_attention", "sparse_gradients"),
    }
    assert read - own <= unused, "DeepSpeed has a new key: decide whether it has an effect here"
    for name, kind in (
        ("comms_logger", CommsLoggerConfig),
        ("tensorboard", TensorBoardConfig),
        ("csv_monitor", CSVConfig),
        ("wandb", WandbConfig),
        ("comet", CometConfig),
        ("zero_optimization", DeepSpeedZeroConfig),
    ):
        assert SETTINGS[name] <= kind.model_fields.keys()


def test_paths_among_deepspeeds_settings_are_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    config = _config(tmp_path, "deepspeed={csv_monitor: {enabled: true, output_path: $SCRATCH/csv}}")
    assert deepspeed_config(config, 2)["csv_monitor"]["output_path"] == "/scratch/me/csv"
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(UserError, match="SCRATCH is not set"):
        _config(tmp_path, "deepspeed={tensorboard: {output_path: $SCRATCH/tb}}")


def test_the_throughput_timer_which_waits_for_the_device_is_off(tmp_path):
    assert deepspeed_config(_config(tmp_path), 2)["timers"] == {"throughput": {"enabled": False}}
    wanted = deepspeed_config(_config(tmp_path, "deepspeed={timers: {throughput: {enabled: true}}}"), 2)
    assert wanted["timers"]["throughput"]["enabled"] is True


def test_other_deepspeed_settings_pass_through(tmp_path):
    config = deepspeed_config(_config(tmp_path, "deepspeed={wall_clock_breakdown: true}"), 2)
    assert config["wall_clock_breakdown"] is True
    assert config["train_batch_size"] == 8


@pytest.mark.parametrize(
    ("section", "parameters", "bucket"),
    [("{}", 1000, 1000), ("{}", 10**12, 500_000_000), ("{zero_optimization: {reduce_bucket_size: 7}}", 1000, 7)],
)
def test_a_bucket_is_no_larger_than_the_network(tmp_path, section, parameters, bucket):
    """ZeRO would allocate two gigabytes for a network of a thousand parameters."""
    config = _config(tmp_path, "parallel.zero_stage=1", f"deepspeed={section}")
    assert deepspeed_config(config, 2, parameters)["zero_optimization"]["reduce_bucket_size"] == bucket
