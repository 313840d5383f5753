# shellcheck shell=bash
# The part that the job scripts of this folder share: environment, containers, saving and requeueing.
# They source it from the checkout.
#
# Containers. SCALEUP_MOUNTS lists further folders as SOURCE:TARGET,SOURCE:TARGET; the checkout is
# mounted under its own path. The image needs what requirements.txt names (launch/Dockerfile).
#
#   SCALEUP_PYXIS=/images/scaleup.sqsh sbatch …       pyxis and enroot; a name such as registry.example.com#scaleup works too
#   SCALEUP_APPTAINER=/images/scaleup.sif sbatch …    apptainer on every node
#
# The network. NCCL and Gloo choose their interfaces themselves. Set these, here or before sbatch, where
# they choose wrongly (NCCL_DEBUG=INFO prints the choice):
#
#   export NCCL_SOCKET_IFNAME=eth0      # interface of NCCL's start; "ib" means all that begin so, "^docker,lo" all others
#   export GLOO_SOCKET_IFNAME=eth0      # interface of runs on CPUs and of checks between hosts; one exact name
#   export NCCL_DEBUG=INFO
# InfiniBand and RoCE:
#   export NCCL_IB_HCA=mlx5             # adapters to use, all that begin so; "=mlx5_0,mlx5_1" means exactly these
#   export NCCL_IB_GID_INDEX=3          # RoCE v2 on many clusters (show_gids)
#   export NCCL_IB_TIMEOUT=22           # larger fabrics
#   export NCCL_NET_GDR_LEVEL=PHB       # how far GPU and adapter may be apart for GPUDirect RDMA
#   export NCCL_IB_DISABLE=1            # TCP instead, to find out whether InfiniBand is the problem
#   ulimit -l unlimited                 # RDMA locks memory
# AWS EFA (the image needs libfabric and aws-ofi-nccl):
#   export FI_PROVIDER=efa
#   export FI_EFA_USE_DEVICE_RDMA=1     # p4d with libfabric older than 1.18
#   export NCCL_SOCKET_IFNAME=^docker,lo

if [ -z "${SLURM_JOB_NODELIST:-}" ]; then
  echo "error: start this with sbatch; without Slurm use launch/torchrun.sh" >&2
  exit 2
fi
export SCALEUP_EXIT_STOPPED=75  # instead of 0, so that a stopped run differs from a finished one
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

container=() # options of srun
enter=()     # words before the command of a task
mounts=$PWD:$PWD${SCALEUP_MOUNTS:+,$SCALEUP_MOUNTS}
if [ -n "${SCALEUP_PYXIS:-}" ] && [ -n "${SCALEUP_APPTAINER:-}" ]; then
  echo "error: set SCALEUP_PYXIS or SCALEUP_APPTAINER, not both" >&2
  exit 2
elif [ -n "${SCALEUP_PYXIS:-}" ]; then
  container=(--container-image="$SCALEUP_PYXIS" --container-mounts="$mounts" --container-workdir="$PWD")
elif [ -n "${SCALEUP_APPTAINER:-}" ]; then
  enter=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$SCALEUP_APPTAINER")
fi
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  # The checkout's own environment belongs to the host, so it is not used in a container.
  if [ -z "${SCALEUP_PYXIS:-}${SCALEUP_APPTAINER:-}" ] && [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
export PYTHON

again() {
  echo "job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}

step=
near_the_end() {
  echo "SIGUSR1, because of the time limit or a preemption: asking the run to save"
  if [ -n "$step" ]; then
    kill -USR1 "$step" 2>/dev/null || true # srun forwards USR1; on SIGTERM it kills the tasks
    wait "$step" || true
  fi
  again
}

# Tell whether a node of the job is down or does not answer; sinfo marks the latter with an asterisk.
node_lost() {
  local states
  states=$(sinfo --noheader --Node --nodes="$SLURM_JOB_NODELIST" --format=%T) || return 1
  [[ $states == *"*"* || $states == *down* ]]
}

# Run a step, and end the job with its exit code: run_step [options of srun] -- COMMAND.
run_step() {
  local options=() code=0
  while [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  shift
  trap near_the_end USR1
  srun "${options[@]}" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "${container[@]}" "${enter[@]}" "$@" &
  step=$!
  wait "$step" || code=$?
  # 75: the run was asked to stop (preemption) and has saved.
  # After the loss of a node the other ranks end with 1 long before Slurm calls the node down
  # (SlurmdTimeout, usually 300 s), and would take the job with them.
  if [ "$code" = 75 ] || { [ "$code" != 0 ] && [ "$code" != 2 ] && node_lost; }; then again; fi
  exit "$code"
}
