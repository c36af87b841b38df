"""Which parameters of a transformer learn in a fine-tuning (``finetune.train``); the others are held."""

from __future__ import annotations

from shodh_moe.base.parameters import hold, mark, marks
from shodh_moe.config.finetune import FineTuningConfig
from shodh_moe.model.low_rank import add_low_rank
from shodh_moe.model.transformer import LatentTransformer
from shodh_moe.parallel import ExpertParallel


def routers_learn(config: FineTuningConfig | None) -> bool:
    """Whether training may change the routers' decisions; None: it is not a fine-tuning."""
    return config is None or config.train in ("all", "router")


def prepare_fine_tuning(model: LatentTransformer, config: FineTuningConfig, ep: ExpertParallel) -> None:
    """Hold the parameters that do not learn; with ``train`` lora, make the additions that do.

    With ``train`` paths, paths without samples keep their weights too, because their gradients are zero and nothing
    decays.
    """
    if config.train == "all":
        return
    if config.train == "lora":
        learning = {id(p) for part in add_low_rank(model, config.rank) for p in part.parameters()}
    elif config.train == "router":
        learning = {id(p) for p in model.parameters() if marks(p).group == "router"}
    else:
        learning = set()
    experts = model.config.moe.num_experts

    def last() -> list[int]:
        return [experts - 1]

    def held_last() -> list[int]:
        """Its place among the experts of this rank."""
        return [place for place, expert in enumerate(ep.local_experts(experts)) if expert == experts - 1]

    for parameter in model.parameters():
        if id(parameter) in learning:
            continue
        kind = marks(parameter)
        if config.train == "paths" and kind.per_expert:
            mark(parameter, decay=False)
        elif config.train == "expert" and kind.per_expert:
            hold(parameter, but=held_last if kind.sharded else last)
        else:
            hold(parameter)
