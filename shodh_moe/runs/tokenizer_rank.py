"""One rank of the tokenizer's training: ``deepspeed --module shodh_moe.runs.tokenizer_rank --config C``."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack

from shodh_moe.base.command import end_rank
from shodh_moe.base.files import require_made
from shodh_moe.base.lock import making, wait_for_first_rank
from shodh_moe.base.variables import number
from shodh_moe.config import Config
from shodh_moe.config.inputs import tokenizer_inputs
from shodh_moe.config.load import load_config
from shodh_moe.config.paths import Paths, resolve_paths
from shodh_moe.runs.folder import open_tokenizer_folder
from shodh_moe.runs.rank import is_first, prepare, rank_main, start_watchdog
from shodh_moe.tokenizer.tokenizer import use_tokenizer
from shodh_moe.training.tokenizer_config import tokenizer_run


def main(arguments: list[str] | None = None) -> int:
    return rank_main("Train the tokenizer (one rank).", _work, arguments)


def _work(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides, options.name)
    paths = resolve_paths(config)

    def is_made() -> bool:
        finished = (paths.tokenizer / "tokenizer.json").exists() and options.resume == "auto"
        return finished or bool(config.tokenizer.path)

    with ExitStack() as stack:
        if options.stop_file is None and not is_made():  # otherwise the command that started the ranks has done this
            job = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            if is_first():
                stack.enter_context(making(paths.tokenizer, "tokenizer", config.name, job=job))
            else:
                wait_for_first_rank(paths.tokenizer, job, is_made)
        if is_made():
            if is_first():
                print(f"[tokenizer] {use_tokenizer(config, paths)}", flush=True)
            return
        _train(options, config, paths)


def _train(options: argparse.Namespace, config: Config, paths: Paths) -> None:
    require_made(paths.dataset / "stats.yaml", "shodh data generate")
    run = tokenizer_run(config, number("WORLD_SIZE"))
    inputs = None
    if is_first():
        open_tokenizer_folder(run, paths)
        inputs = tokenizer_inputs(config, paths)
    watchdog = start_watchdog(options, run, paths.tokenizer)

    prepare()
    from shodh_moe.training.tokenizer_task import train_tokenizer

    train_tokenizer(run, paths.dataset, paths.tokenizer, options.resume, watchdog, inputs)


if __name__ == "__main__":
    end_rank(main)
