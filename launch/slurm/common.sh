# shellcheck shell=bash
# Checks, and rules for requeueing. The batch scripts in this folder source this file after setting REPOSITORY.

refuse() {
    echo "error: $1" >&2
    exit 2
}

# Check the settings of every script, and set PYTHON, the interpreter.
check_job() {
    [ -n "${SLURM_JOB_ID:-}" ] || refuse "this is not a SLURM job: submit the script with sbatch"
    [ -n "${CONFIG:-}" ] || refuse "CONFIG is not set: submit with CONFIG=configs/quickstart.yaml sbatch ..."
    [ -f "$CONFIG" ] || refuse "CONFIG: there is no file $CONFIG in $PWD: give its path from where sbatch is called"
    PYTHON=${PYTHON:-$REPOSITORY/.venv/bin/python}
    command -v "$PYTHON" > /dev/null || refuse "there is no interpreter $PYTHON on $(hostname): run make venv, or set PYTHON"
    # Since SLURM 22.05, srun does not inherit --cpus-per-task from sbatch.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
}

# Set the rendezvous for the ranks of the next srun: SLURM's address of this node, the first of the job, and a port that
# is free now, below the ephemeral ports.
meet_on_this_node() {
    MASTER_ADDR=$(scontrol --oneliner show node "$SLURMD_NODENAME" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    MASTER_PORT=$("$PYTHON" -c '
import random, socket
for port in random.sample(range(20000, 30000), 100):
    try:
        socket.create_server(("", port)).close()
    except OSError:
        continue
    print(port)
    break
')
    export MASTER_ADDR MASTER_PORT
}

# end_job CODE: end the script with srun's exit code. If a signal stopped the work, requeue the job first. 75 means that
# a checkpoint was written, 128 + 10 and 128 + 15 that SIGUSR1 or SIGTERM ended the ranks directly.
end_job() {
    local state restarts=${SLURM_RESTART_COUNT:-0} most=${MAX_RESTARTS:-100}
    case $1 in 75 | 138 | 143) ;; *) exit "$1" ;; esac
    # Only requeue a RUNNING job: scontrol would also requeue a job that scancel has ended. Such a job is COMPLETING by
    # now, as is one that SLURM itself requeues.
    state=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')
    if [ "$state" != RUNNING ]; then
        echo "stopped by a signal; the job is $state and does not requeue itself"
    elif [ "$restarts" -ge "$most" ]; then
        echo "error: stopped by a signal after $restarts restarts, MAX_RESTARTS is $most: submit again to go on" >&2
    elif scontrol requeue "$SLURM_JOB_ID"; then
        echo "stopped by a signal: the job is in the queue again and will go on"
    fi
    exit "$1"
}
