"""Pretraining: one process, or one rank of many, however it is started.

python launch/pretrain.py --config C                            one process
deepspeed --num_gpus 8 launch/pretrain.py --config C            eight ranks of this host
deepspeed --hostfile H launch/pretrain.py --config C            the hosts of a hostfile
deepspeed launch/pretrain.py --hostfile H --config C            the same, with every host asked first (docs/cluster.md)
torchrun --nproc-per-node 8 launch/pretrain.py --config C
srun python launch/pretrain.py --config C                       see launch/slurm/pretrain.sbatch
mpirun -n 8 python launch/pretrain.py --config C

``--resume`` (auto, or a checkpoint) and settings such as ``training.steps=200`` may follow.
"""

import os

from shodh_moe.cli import main as shodh
from shodh_moe.command import OneLineParser, end_rank, exit_code
from shodh_moe.parallel.launch import forget_launcher, require_hostfile_of_launcher
from shodh_moe.training.__main__ import main as train


def main() -> int:
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--hostfile")
    parser.add_argument("--local_rank")
    options, rest = parser.parse_known_args()
    # DeepSpeed's launcher takes only what stands before the script: here it has started ranks on one host alone.
    if options.hostfile and int(os.environ.get("CROSS_SIZE", 1)) == 1:
        first = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if "CROSS_SIZE" in os.environ:
            forget_launcher()
        return shodh(["pretrain", "--hostfile", options.hostfile, *rest]) if first else 0

    return exit_code(require_hostfile_of_launcher) or train(rest)


if __name__ == "__main__":
    end_rank(main)
