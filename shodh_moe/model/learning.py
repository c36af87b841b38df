"""Which parameters of a transformer learn in a fine-tuning (``finetune.train``); the others are held."""

from __future__ import annotations

from shodh_moe.base.parameters import hold, marks
from shodh_moe.config.finetune import FineTuningConfig
from shodh_moe.model.low_rank import add_low_rank
from shodh_moe.model.transformer import LatentTransformer
from shodh_moe.parallel import ExpertParallel


def prepare_fine_tuning(model: LatentTransformer, config: FineTuningConfig, ep: ExpertParallel) -> None:
    """Hold the parameters that do not learn; with ``train`` lora, make the additions that do."""
    if config.train == "all":
        return
    if config.train == "lora":
        learning = {id(p) for part in add_low_rank(model, config.rank) for p in part.parameters()}
    elif config.train == "router":
        learning = {id(p) for p in model.parameters() if marks(p).group == "router"}
    else:
        learning = set()
    experts = model.config.moe.num_experts
    for parameter in model.parameters():
        if id(parameter) in learning:
            continue
        kind = marks(parameter)
        if config.train == "expert" and kind.per_expert:
            mine = ep.local_experts(experts) if kind.sharded else range(experts)
            hold(parameter, but=[mine.index(experts - 1)] if experts - 1 in mine else [])
        else:
            hold(parameter)
