"""Settings that create new artefacts, and settings that keep the existing ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from shodh_moe.config import Config
from shodh_moe.config.load import load_config
from shodh_moe.config.paths import Paths, resolve_paths
from shodh_moe.training.tokenizer_config import tokenizer_run
from tests.tiny import CONFIG, config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Folder names of earlier versions, in which keys did not state what they change: users' artefacts must still be found.
GOLDEN = [
    ("quickstart", [], "quickstart-68051653", "quickstart-d7274af0", "quickstart-86d6959c"),
    ("quickstart", ["tokenizer.seed=7", "seed=3"], "quickstart-68051653", "quickstart-7b5de9f8", "quickstart-8ee93781"),
    (
        "quickstart",
        ["data.weights={open_channel: 2.0, porous_media: 1.0}"],
        *("quickstart-68051653", "quickstart-371dd969", "quickstart-86d6959c"),
    ),
    (
        "quickstart",
        ["tokenizer.latent_copies=1", "tokenizer.latent_symmetries=cube"],
        *("quickstart-68051653", "quickstart-d7274af0", "quickstart-61be61c9"),
    ),
    ("cluster_8x8", [], "flows_128_full-6444a225", "flows_128_full-49363868", "flows_128_full-b123269d"),
    (
        "cluster_8x8",
        ["data.domains.open_channel=null"],
        *("flows_128_full-34c2c86e", "flows_128_full-3c6d3ab6", "flows_128_full-cd44709b"),
    ),
    (
        "cluster_8x8",
        ["data.skip_bad=true", "tokenizer.log_every=7", "tokenizer.activation_checkpointing=false", "model.dim=96"],
        *("flows_128_full-6444a225", "flows_128_full-49363868", "flows_128_full-b123269d"),
    ),
    ("cluster_8x8", ["data.name=x", "data.root=r", "tokenizer.root=t"], "x-6444a225", "x-49363868", "x-b123269d"),
]


@pytest.mark.parametrize(("name", "overrides", "dataset", "tokenizer", "latents"), GOLDEN)
def test_folder_names_equal_those_of_earlier_versions(
    name: str, overrides: list[str], dataset: str, tokenizer: str, latents: str
) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    paths = resolve_paths(config)
    assert paths.dataset == Path(config.data.root) / dataset
    assert paths.tokenizer == Path(config.tokenizer.root) / tokenizer
    assert paths.latents == paths.tokenizer / "latents" / latents
    assert paths.run == Path("runs") / name


def _paths(run_seed: int, **tokenizer: object) -> Paths:
    return resolve_paths(config(seed=run_seed, tokenizer={**CONFIG["tokenizer"], **tokenizer}))


def test_the_tokenizers_own_seed_takes_precedence() -> None:
    own = _paths(3)
    assert _paths(4, seed=3) == own
    for another in (_paths(4), _paths(3, seed=4)):
        assert another.dataset == own.dataset
        assert another.tokenizer != own.tokenizer
        assert another.latents != own.latents


def test_the_tokenizer_run_is_the_same_for_both_ways_to_set_its_seed() -> None:
    sections = {**CONFIG["tokenizer"], "seed": 3}
    run = tokenizer_run(config(seed=7, tokenizer=sections), 1)
    assert run == tokenizer_run(config(seed=3), 1)
    assert tokenizer_run(Config.model_validate(run.model_dump()), 1) == run
