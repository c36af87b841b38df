"""Which settings make other artefacts, and which find those that are there."""

from __future__ import annotations

from shodh_moe.config import Config
from shodh_moe.config.paths import Paths, paths_of
from shodh_moe.training.tokenizer_config import tokenizer_run
from tests.tiny import CONFIG, config


def _paths(run_seed: int, **tokenizer: object) -> Paths:
    return paths_of(config(seed=run_seed, tokenizer={**CONFIG["tokenizer"], **tokenizer}))


def test_the_tokenizers_own_seed_counts_where_it_is_given() -> None:
    own = _paths(3)
    assert _paths(4, seed=3) == own
    for another in (_paths(4), _paths(3, seed=4)):
        assert another.dataset == own.dataset
        assert another.tokenizer != own.tokenizer
        assert another.latents != own.latents


def test_the_tokenizers_run_does_not_depend_on_how_its_seed_was_given() -> None:
    sections = {**CONFIG["tokenizer"], "seed": 3}
    given = tokenizer_run(config(seed=7, tokenizer=sections), 1)
    assert given == tokenizer_run(config(seed=3), 1)
    assert tokenizer_run(Config.model_validate(given.model_dump()), 1) == given
