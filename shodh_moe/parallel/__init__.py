"""Expert parallelism: which rank holds which experts, and the exchanges that send tokens or samples to them."""

from shodh_moe.parallel.expert_parallel import Exchange, ExpertParallel, all_to_all, start_all_to_all
from shodh_moe.parallel.placement import place_experts
from shodh_moe.parallel.reduction import sum_over_ranks
from shodh_moe.parallel.sample_exchange import SampleExchange

__all__ = [
    "Exchange",
    "ExpertParallel",
    "SampleExchange",
    "all_to_all",
    "place_experts",
    "start_all_to_all",
    "sum_over_ranks",
]
