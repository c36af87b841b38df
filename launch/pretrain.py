"""Pretrain the latent transformer, in a single process or as one of many ranks, with any launcher.

python launch/pretrain.py --config C                            one process
deepspeed --num_gpus 8 launch/pretrain.py --config C            eight ranks on this host
deepspeed --hostfile H launch/pretrain.py --config C            ranks on the hosts of a hostfile
deepspeed launch/pretrain.py --hostfile H --config C            the same, after probing every host (docs/cluster.md)
torchrun --nproc-per-node 8 launch/pretrain.py --config C
srun python launch/pretrain.py --config C                       see launch/slurm/pretrain.sbatch
mpirun -n 8 python launch/pretrain.py --config C

You can add ``--resume`` (auto, or a checkpoint) and settings such as ``training.steps=200``.
"""

from shodh_moe.base.command import end_rank
from shodh_moe.cli import main as shodh
from shodh_moe.runs.pretrain_rank import main as train
from shodh_moe.runs.rank import script_main

if __name__ == "__main__":
    end_rank(lambda: script_main(lambda arguments: shodh(["pretrain", *arguments]), train))
