"""Which rank holds which experts and which part of each sample, and the exchanges between ranks."""

from shodh_moe.parallel.context_parallel import ALONE, ContextParallel, join_context
from shodh_moe.parallel.expert_parallel import Exchange, ExpertParallel, all_to_all, start_all_to_all
from shodh_moe.parallel.layout import Layout
from shodh_moe.parallel.placement import place_experts
from shodh_moe.parallel.reduction import sum_over_ranks
from shodh_moe.parallel.sample_exchange import SampleExchange

__all__ = [
    "ALONE",
    "ContextParallel",
    "Exchange",
    "ExpertParallel",
    "Layout",
    "SampleExchange",
    "all_to_all",
    "join_context",
    "place_experts",
    "start_all_to_all",
    "sum_over_ranks",
]
