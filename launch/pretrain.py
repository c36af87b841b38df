"""Pretraining, one rank: start it with the DeepSpeed launcher, or alone for a single process.

deepspeed --num_gpus 2 launch/pretrain.py --config configs/quickstart.yaml
"""

from shodh_moe.command import end_rank
from shodh_moe.training.__main__ import main

if __name__ == "__main__":
    end_rank(main)
