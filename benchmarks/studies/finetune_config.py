"""The config of the studies of fine-tuning and of unlike inputs, and the model that both begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from shodh_moe.base.command import OneLineParser
from shodh_moe.base.section import Positive, PositiveFloat, Section
from shodh_moe.cli import main as shodh
from shodh_moe.config.data import Domains
from shodh_moe.config.load import load_config, load_config_of

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "finetune" / "study.yaml"
Way = Literal["all", "expert", "lora", "same_tokenizer", "scratch"]


S = TypeVar("S", bound=Section)


class Counts(Section, changes="nothing"):
    """Trajectories of the new domain by split."""

    train: Positive
    valid: Positive
    test: Positive


class StudyConfig(Section, changes="nothing"):
    """See configs/finetune/study.yaml."""

    base: str
    folder: str
    domain: str
    settings: dict[str, Any]
    snapshots: Positive
    trajectories: Counts
    counts: list[Positive]
    ways: list[Way]
    steps: Positive
    learning_rates: dict[str, PositiveFloat]
    seed: int
    held_out: list[str]
    held_out_trajectories: Positive


def read_arguments(
    description: str, result: str, arguments: list[str] | None, kind: type[S], default: Path = CONFIG
) -> tuple[S, Path]:
    """Read the command line of a study; return its config, which has the key ``folder``, and the JSON file to write."""
    parser = OneLineParser(description=description)
    shown = default.relative_to(ROOT)
    parser.add_argument("--config", type=Path, default=default, help=f"default: {shown}")
    parser.add_argument("--json", type=Path, help=f"file for the results; default: {result} in the study's folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the config's")
    options = parser.parse_args(arguments)
    config = load_config_of(kind, options.config, options.overrides)
    return config, options.json or Path(config.model_dump()["folder"]) / result


def command(*arguments: str) -> None:
    """Run a command. Raises SystemExit with its exit code, after its message."""
    if code := shodh([*arguments]):
        raise SystemExit(code)


def base_model(config: StudyConfig) -> Path:
    """Train the model of ``base`` if it is not there, and return its export."""
    model = Path(config.folder) / "base_model"
    if not model.exists():
        base = load_config(config.base)
        for step in (("data", "generate"), ("tokenizer", "train"), ("tokenizer", "encode"), ("pretrain",)):
            command(*step, "--config", config.base)
        model.parent.mkdir(parents=True, exist_ok=True)
        command("checkpoint", "export", str(Path(base.runs) / base.name), "--output", str(model))
    return model


def only_domain(name: str, settings: dict[str, Any], counts: dict[str, int]) -> dict[str, Any]:
    """The section ``data.domains`` with one domain."""
    others = dict.fromkeys(Domains.model_fields)
    return {**others, name: {**settings, "trajectories": counts}}
