"""The process of a rehearsal: ``python -m shodh_moe.rehearsal CONFIG WORLD RANK RESULT`` (see `rehearse`)."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

import torch

from shodh_moe.config.load import load_config
from shodh_moe.rehearsal.device import pretend_cuda
from shodh_moe.rehearsal.findings import Findings


def main(config_path: str, world: str, rank: str, result: str) -> None:
    """Rehearse one rank and write its `Findings` as JSON."""
    config, size = load_config(Path(config_path)), int(world)
    pretend_cuda(int(rank), int(world))
    # These import DeepSpeed, which looks for the device as it is imported.
    from shodh_moe.rehearsal.prediction import rehearse_prediction
    from shodh_moe.rehearsal.pretraining import rehearse_pretraining
    from shodh_moe.rehearsal.tokenizing import rehearse_tokenizer
    from shodh_moe.rehearsal.watch import Watch
    from shodh_moe.training.tokenizer_config import tokenizer_run

    watch, error = Watch(), ""
    try:
        with watch:
            rehearse_pretraining(config, watch)
            if config.tokenizer.batch_size % size == 0:  # otherwise its training has other ranks
                rehearse_tokenizer(tokenizer_run(config, size), watch)
            if rank == "0":
                rehearse_prediction(config, watch)
    except Exception as failure:
        traceback.print_exc()
        error = f"{watch.phase}: {watch.place_of(failure)}: {type(failure).__name__}: {str(failure).splitlines()[0]}"
    found = Findings(
        int(rank),
        int(world),
        dict(watch.peaks),
        [(*key, count) for key, count in watch.waits.items()],
        [(*key, count, watch.sent[key]) for key, count in watch.collectives.items()],
        [(*key[:3], _names(key.dtypes), count) for key, count in watch.products.items()],
        error,
    )
    Path(result).write_text(json.dumps(found.as_dict(), indent=1), encoding="utf-8")


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return " ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


if __name__ == "__main__":
    main(*sys.argv[1:])
