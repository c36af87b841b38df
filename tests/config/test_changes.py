"""Each config key states which artefact it changes; a new key needs no other registration."""

from __future__ import annotations

from pathlib import Path

import pytest

from shodh_moe.base.errors import UserError
from shodh_moe.base.section import ARTEFACTS, Section, first_changed, section_of, setting, settings_that_change
from shodh_moe.ccm.config import ExpertConfig
from shodh_moe.config import Config, ParallelConfig, TrainingConfig
from shodh_moe.runs.folder import claim_run_folder

# The configs of run folders.
RUN_CONFIGS = (Config, ExpertConfig)


def leaves(kind: type[Section], prefix: str = "") -> list[str]:
    """Return the dotted keys whose values are not sections."""
    found = []
    for name, field in kind.model_fields.items():
        inner = section_of(field)
        found += leaves(inner, f"{prefix}{name}.") if inner else [prefix + name]
    return found


@pytest.mark.parametrize("kind", RUN_CONFIGS)
def test_every_key_states_what_it_changes(kind: type[Section]) -> None:
    keys = leaves(kind)
    assert len(keys) > 30
    assert {first_changed(kind, key) for key in keys} <= set(ARTEFACTS)


def test_an_artefacts_name_depends_on_the_sections_that_change_it() -> None:
    """`resolve_paths` and `differing_model_keys` consider only these sections."""
    sections = {"data": ("data.",), "tokenizer": ("data.", "tokenizer.", "seed"), "latents": ("tokenizer.",)}
    sections["model"] = ("model.",)
    for key in leaves(Config):
        if artefact := sections.get(first_changed(Config, key)):
            assert key.startswith(artefact), key


def test_a_key_that_states_no_artefact_or_two_is_an_error() -> None:
    class Silent(Section):
        size: int = 1

    class Contradictory(Section, changes="run"):
        size: int = setting(1, changes="nothing")

    for kind, message in ((Silent, "neither"), (Contradictory, "both")):
        with pytest.raises(TypeError, match=rf"{kind.__name__}\.size: {message}"):
            first_changed(kind, "size")


class Inner(Section, changes="data"):
    size: int = 1


class Derived(Inner):
    more: int = 2


class Toy(Section):
    name: str = setting("toy", changes="nothing")
    runs: str = setting("runs", changes="nothing")
    flow: Derived | None = Derived()
    codes: dict[str, int] = setting({}, changes="tokenizer")
    steps: int = setting(3, changes="run", gt=0)
    threads: int = setting(4, changes="nothing")
    inner: ParallelConfig = ParallelConfig()


def test_dotted_keys_are_resolved_to_artefacts() -> None:
    expected = {
        "flow.size": "data",
        "flow.more": "data",
        "flow": "data",
        "codes.a.b": "tokenizer",
        "steps": "run",
        "inner.ep_size": "nothing",
        # Keys of earlier versions: their section decides, and without one they change everything.
        "inner.removed": "nothing",
        "removed": "data",
        "removed.key": "data",
    }
    assert {key: first_changed(Toy, key) for key in expected} == expected


def test_settings_are_selected_with_their_sections() -> None:
    toy = Toy(codes={"a": 5})
    assert settings_that_change(toy, "data") == {"flow": {"size": 1, "more": 2}}
    assert settings_that_change(Toy(flow=None), "data") == {"flow": None}
    assert settings_that_change(toy, "tokenizer") == {"codes": {"a": 5}}
    assert settings_that_change(toy, "model") == {}


def test_run_folders_follow_the_declarations_of_keys(tmp_path: Path) -> None:
    toy = Toy(runs=str(tmp_path))
    claim_run_folder(toy)
    claim_run_folder(toy.model_copy(update={"threads": 9, "inner": ParallelConfig(ep_size=2)}), write=False)
    with pytest.raises(UserError, match=r"it differs in steps \(3 there, 5 here\): "):
        claim_run_folder(toy.model_copy(update={"steps": 5}), write=False)
    with pytest.raises(UserError, match=r"it differs in flow\.size \(1 there, 2 here\): "):
        claim_run_folder(toy.model_copy(update={"flow": Derived(size=2)}), write=False)


@pytest.mark.parametrize("kind", RUN_CONFIGS)
def test_a_run_folder_accepts_keys_that_change_nothing(tmp_path: Path, kind: type[Config]) -> None:
    config = kind(runs=str(tmp_path))
    claim_run_folder(config)
    training = TrainingConfig(norm="torch", keep_every=7, stall_seconds=5.0)
    free = {"training": training, "deepspeed": {"wall_clock_breakdown": True}, "parallel": ParallelConfig(ep_size=2)}
    claim_run_folder(config.model_copy(update=free), write=False)
    for changed in ({"seed": 5}, {"start": "runs/other"}, {"training": TrainingConfig(weight_decay=0.1)}):
        with pytest.raises(UserError, match="belongs to another config"):
            claim_run_folder(config.model_copy(update=changed), write=False)
