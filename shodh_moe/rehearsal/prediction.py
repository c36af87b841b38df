"""Rehearse a prediction: both networks in one process, as `shodh predict` runs them."""

from __future__ import annotations

from itertools import islice

import torch

from shodh_moe.config import Config
from shodh_moe.inference.model import Model
from shodh_moe.parallel import ExpertParallel
from shodh_moe.rehearsal.pretraining import OnDevice
from shodh_moe.rehearsal.watch import Watch
from shodh_moe.tokenizer.tokenizer import Tokenizer

STEPS = 2


def rehearse_prediction(config: Config, watch: Watch) -> None:
    """Encode a flow, predict two snapshots and decode them, in the phase predict."""
    channels, grid = config.tokenizer.latent_channels, config.data.grid
    with watch.during("predict build"):
        with torch.device("cuda"):
            tokenizer = Tokenizer(config.tokenizer, grid)
        transformer = OnDevice(config.model, channels, config.seed, ExpertParallel())
        model = Model(tokenizer.eval(), transformer.eval(), 0, 1, 1, "")
    with watch.during("predict"), torch.no_grad():
        flow = model.continue_flow(
            torch.zeros(config.model.history, 4, *grid), torch.zeros(1, *grid), config.model.strides[0]
        )
        list(islice(flow, STEPS))
