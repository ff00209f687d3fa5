#!/usr/bin/env bash
# A run as one Slurm job of two parts: a node with a GPU for driver, learner and shards, and nodes for actors. docs/slurm.md has the
# commands; what you must set is marked SET.
#
#   sbatch --export=ALL,QFLEET_CHECKOUT=$HOME/qfleet,QFLEET_RUNS=/scratch/$USER/runs deploy/cluster/slurm.sh
#
#SBATCH --job-name=qfleet
#SBATCH --output=qfleet-%j.log
#SBATCH --open-mode=append
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --partition=gpu
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=1
#SBATCH --mem=64G
#SBATCH --exclusive
#SBATCH hetjob
#SBATCH --partition=cpu
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --mem=32G
#SBATCH --exclusive
# SET above: the partitions, and how many nodes, processors and hours. --exclusive, as Ray's ports are the same in every job.
set -euo pipefail

checkout=${QFLEET_CHECKOUT:?"give the path of the checkout, with its .venv, on a file system that all nodes have"}
runs=${QFLEET_RUNS:?"give the path of the run directories, on a file system that all nodes have"}
token_file=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}

# The token is read from this file on every node, and is in no environment and on no command line, which other users can see.
mode=$(stat --dereference --format=%a "$token_file" 2>/dev/null || echo none)
if [[ $mode != 600 && $mode != 400 ]]; then
    echo "$token_file: mode $mode; make it with: ray get-auth-token --generate > /dev/null; chmod 600 $token_file" >&2
    exit 2
fi
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token_file RAY_USAGE_STATS_ENABLED=0
export RAY_health_check_failure_threshold=10 # A node that is silent is given up after two minutes, not one.
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=300 # Seconds for all nodes to join; Ray's own 30 are few on a busy file system.
export PATH=$checkout/.venv/bin:$PATH
cd "$checkout"

mapfile -t hosts < <(
    scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_0"
    scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1"
)
HEAD_IP=$(getent ahostsv4 "${hosts[0]}" | awk '{ print $1; exit }')
HEAD_NODE=${hosts[0]}
NUM_NODES=${#hosts[@]}
RUN_DIR=$runs/apex
DRIVER_PID=${TMPDIR:-/tmp}/qfleet-$SLURM_JOB_ID.pid # On the head's own disk, where this script runs too.
export HEAD_IP HEAD_NODE NUM_NODES RUN_DIR DRIVER_PID

# Before the time is over Slurm signals this script alone. Only the driver is told: it writes a checkpoint while Ray is still there.
requeue=no
# shellcheck disable=SC2329 # The trap calls it.
on_time_limit() {
    echo "time is over: a checkpoint, and the job goes back into the queue"
    requeue=yes
    [[ ! -s $DRIVER_PID ]] || kill -TERM "$(cat "$DRIVER_PID")" || true
}
trap on_time_limit USR1

# What each node does. Every node gives Ray the same options but for its labels and GPUs; the first one runs the driver, whose process
# takes the shell's place. The other nodes leave when it has ended. The variables are for the nodes' shells, not for this one.
# shellcheck disable=SC2016
on_each_node='
if [[ $(hostname --short) == "${HEAD_NODE%%.*}" ]]; then role=learner gpus=1; else role=env gpus=0; fi
exec ray symmetric-run --address "$HEAD_IP:6379" --min-nodes "$NUM_NODES" \
    --num-cpus="$(nproc)" --num-gpus="$gpus" --labels="role=$role" --object-store-memory=2000000000 -- \
    bash -c "echo \$\$ > \"\$DRIVER_PID\"; exec qfleet train apex --address auto --actors.node-labels role=env --learner.node-labels role=learner --run-dir \"\$RUN_DIR\""
'
# A node of actors that is lost ends neither the step nor the job.
srun --het-group=0,1 --no-kill --kill-on-bad-exit=0 --wait=0 bash -c "$on_each_node" &
step=$!
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # A trap ends `wait` early.
    status=0
    wait "$step" || status=$?
done
rm -f "$DRIVER_PID"

if [[ $requeue == yes ]]; then
    scontrol requeue "$SLURM_JOB_ID" # The same command goes on with the run.
fi
exit "$status"
