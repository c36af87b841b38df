"""Where experts live and how tokens reach them: expert-parallel groups and their all-to-all."""

from shodh_moe.parallel.expert_parallel import Exchange, ExpertParallel, all_to_all, start_all_to_all

__all__ = ["Exchange", "ExpertParallel", "all_to_all", "start_all_to_all"]
