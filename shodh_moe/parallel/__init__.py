"""Expert parallelism: which rank holds which experts, and the all-to-all that sends tokens to them."""

from shodh_moe.parallel.expert_parallel import Exchange, ExpertParallel, all_to_all, start_all_to_all
from shodh_moe.parallel.reduction import sum_over_ranks

__all__ = ["Exchange", "ExpertParallel", "all_to_all", "start_all_to_all", "sum_over_ranks"]
