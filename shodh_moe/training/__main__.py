"""One rank of pretraining: ``deepspeed --module shodh_moe.training --config runs/<name>/config.yaml``."""

from __future__ import annotations

import argparse
import os
import sys

from shodh_moe.command import exit_code
from shodh_moe.config_io import load_config
from shodh_moe.paths import paths_of


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pretrain the latent mixture-of-experts transformer (one rank).")
    parser.add_argument("--config", required=True, help="config file, e.g. configs/quickstart.yaml")
    parser.add_argument("--name", help="run name; default: the config's")
    parser.add_argument("--local_rank", help="set by some launchers; the environment decides")
    parser.add_argument("--debug", action="store_true", help="show a traceback for wrong input too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. training.steps=200")
    options = parser.parse_args(arguments)

    def work() -> None:
        import torch

        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        from shodh_moe.memory import keep_freed_memory
        from shodh_moe.pipeline import claim_run_folder
        from shodh_moe.training.pretrain import pretrain

        keep_freed_memory()
        config = load_config(options.config, options.overrides, options.name)
        paths = paths_of(config)
        claim_run_folder(config, write=int(os.environ.get("RANK", 0)) == 0)
        pretrain(config, paths.run, paths.latents)

    return exit_code(work, options.debug)


if __name__ == "__main__":
    sys.exit(main())
