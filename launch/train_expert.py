"""Training of an expert (a neural operator of a family): one process, or one rank of many, however it is started.

python launch/train_expert.py --config C                        one process
deepspeed --num_gpus 8 launch/train_expert.py --config C        eight ranks of this host
srun python launch/train_expert.py --config C                   and every other way of launch/pretrain.py

The data must be there: `shodh expert data --config C` makes them.
"""

from shodh_moe.base.command import end_rank
from shodh_moe.ccm.expert_rank import main as train
from shodh_moe.cli import main as shodh
from shodh_moe.runs.rank import script_main

if __name__ == "__main__":
    end_rank(lambda: script_main(lambda arguments: shodh(["expert", "train", *arguments]), train))
