"""One rank of pretraining: ``deepspeed --module shodh_moe.training --config runs/<name>/config.yaml``."""

from __future__ import annotations

import os
from pathlib import Path

from shodh_moe.checks import claim_run_folder, open_run_folder, require_made
from shodh_moe.command import OneLineParser, add_config_arguments, end_rank, exit_code
from shodh_moe.config_io import load_config
from shodh_moe.memory import keep_freed_memory
from shodh_moe.parallel.launch import set_rank_variables
from shodh_moe.paths import paths_of


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(description="Pretrain the latent mixture-of-experts transformer (one rank).")
    add_config_arguments(parser)
    parser.add_argument("--resume", default="auto", help="auto (the run's newest intact checkpoint) or a checkpoint")
    parser.add_argument("--stop-file", type=Path, help="by which the launching process asks for an end")
    parser.add_argument("--local_rank", help="set by some launchers; the environment decides")
    options = parser.parse_args(arguments)

    def work() -> None:
        set_rank_variables()
        config = load_config(options.config, options.overrides, options.name)
        paths = paths_of(config)
        require_made(paths.latents, "shodh tokenizer encode")
        if int(os.environ.get("RANK", 0)) == 0:
            open_run_folder(config)
        else:
            claim_run_folder(config, write=False)

        import torch

        if "OMP_NUM_THREADS" not in os.environ:  # every rank would take all cores
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        from shodh_moe.tokenizer.tokenizer import tokenizer_sha256
        from shodh_moe.training.pretrain import pretrain

        keep_freed_memory()
        pretrain(config, paths.run, paths.latents, options.resume, tokenizer_sha256(paths.tokenizer), options.stop_file)

    return exit_code(work, options.debug)


if __name__ == "__main__":
    end_rank(main)
