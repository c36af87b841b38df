"""One rank of pretraining: ``deepspeed --module shodh_moe.runs.pretrain_rank --config runs/<name>/config.yaml``."""

from __future__ import annotations

import argparse

from shodh_moe.base.command import end_rank
from shodh_moe.base.files import require_made
from shodh_moe.base.lock import wait_for_maker
from shodh_moe.config.load import load_config
from shodh_moe.config.paths import resolve_paths
from shodh_moe.runs.folder import claim_run_folder, open_run_folder
from shodh_moe.runs.rank import is_first, prepare, rank_main, start_watchdog


def main(arguments: list[str] | None = None) -> int:
    return rank_main("Pretrain the latent mixture-of-experts transformer (one rank).", _work, arguments)


def _work(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides, options.name)
    paths = resolve_paths(config)
    wait_for_maker(paths.latents, "latents")
    require_made(paths.latents, "shodh tokenizer encode")
    if is_first():
        open_run_folder(config, paths)
    else:
        claim_run_folder(config, write=False)
    watchdog = start_watchdog(options, config, paths.run)

    prepare()
    from shodh_moe.training.pretrain import pretrain

    pretrain(config, paths.run, paths.latents, options.resume, paths.tokenizer, watchdog)


if __name__ == "__main__":
    end_rank(main)
