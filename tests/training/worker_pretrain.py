"""One rank of test_pretrain: the training function on a folder that holds config.yaml and latents."""

from __future__ import annotations

import sys
from pathlib import Path

from shodh_moe.config_io import load_config
from shodh_moe.training.pretrain import pretrain

folder, run = Path(sys.argv[-2]), Path(sys.argv[-1])
pretrain(load_config(folder / "config.yaml"), run, folder / "latents")
