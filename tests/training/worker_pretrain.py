"""One rank of test_pretrain: pretrain on a folder that holds config.yaml and latents.

Arguments: folder, run folder, checkpoint to resume from, then overrides; ``rank1:key=value`` applies to rank 1 only.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from shodh_moe.base.command import end_rank, exit_code
from shodh_moe.config.load import load_config
from shodh_moe.training.pretrain import pretrain

arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
folder, run, resume = Path(arguments[0]), Path(arguments[1]), arguments[2] if arguments[2:] else "auto"
own_prefix = f"rank{os.environ['RANK']}:"
overrides = [o.removeprefix(own_prefix) for o in arguments[3:] if o.startswith(own_prefix) or not o.startswith("rank")]
run.mkdir(exist_ok=True)
config = load_config(folder / "config.yaml", overrides)
end_rank(lambda: exit_code(lambda: pretrain(config, run, folder / "latents", resume)))
