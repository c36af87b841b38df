"""One rank of an expert's training: ``deepspeed --module shodh_moe.ccm.expert_rank --config C``."""

from __future__ import annotations

import argparse
from pathlib import Path

from shodh_moe.base.command import end_rank
from shodh_moe.ccm.config import ExpertConfig
from shodh_moe.config.load import load_config_of
from shodh_moe.runs.folder import claim_run_folder, write_environment
from shodh_moe.runs.rank import is_first, prepare, rank_main, start_watchdog


def main(arguments: list[str] | None = None) -> int:
    return rank_main("Run one rank of the training of an expert (a neural operator).", _work, arguments)


def _work(options: argparse.Namespace) -> None:
    config = load_config_of(ExpertConfig, options.config, options.overrides, options.name)
    run = Path(config.runs) / config.name
    claim_run_folder(config, write=is_first())
    if is_first():
        write_environment(run)
    watchdog = start_watchdog(options, config, run)

    prepare()
    from shodh_moe.ccm.train import train_expert

    train_expert(config, run, options.resume, watchdog)


if __name__ == "__main__":
    end_rank(main)
