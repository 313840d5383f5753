#!/usr/bin/env bash
# Start the processes of a run on this node. On several nodes, run the same line on every node with
# its own NODE_RANK. On a machine without GPUs, NPROC sets the number of processes.
#
#   NPROC=2 launch/torchrun.sh configs/quickstart.yaml
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=n01 launch/torchrun.sh configs/llama_70b.yaml data.train_file=chats.jsonl
#
#   NNODES=1:4 MASTER_ADDR=n01 launch/torchrun.sh configs/bart_large.yaml     (elastic)
#
#   NNODES       number of nodes (1)                      MASTER_ADDR  host name of node 0 (this host)
#   NODE_RANK    number of this node, from 0 (0)          MASTER_PORT  a free port on node 0 (29500)
#   NPROC        processes on this node (one per GPU, or 1 without GPUs)
#   PYTHON       interpreter (.venv/bin/python of the checkout, else python3)
#
# With NNODES=MIN:MAX the run starts as soon as MIN nodes have met and no other has come for a while,
# and nodes have no NODE_RANK. If a node is lost, the processes of all others end and start again on
# the nodes that are left, with train.resume=auto; nodes that come later join them. The node
# MASTER_ADDR holds the rendezvous and has to stay.
#
#   LAST_CALL    seconds to wait for more than MIN nodes (30)
#   RESTARTS     how many times processes are started again after an error (10)
#
# Variables that are not set default to those of Kubeflow (PET_*) or of an Indexed Job
# (JOB_COMPLETION_INDEX). Inside a process that a launcher has already started (RANK and LOCAL_RANK
# are set), this script becomes that process.
set -euo pipefail
if [ $# -lt 1 ]; then
  echo "usage: [NNODES=…] [NODE_RANK=…] [MASTER_ADDR=…] [MASTER_PORT=…] [NPROC=…] $0 CONFIG [section.key=value …]" >&2
  exit 2
fi
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
config=$1
shift
if [ -z "${PYTHON:-}" ]; then
  if [ -x "$home/.venv/bin/python" ]; then PYTHON=$home/.venv/bin/python; else PYTHON=python3; fi
fi
if [ -n "${RANK:-}" ] && [ -n "${LOCAL_RANK:-}" ]; then
  exec "$PYTHON" "$home/launch/train.py" --config "$config" "$@"
fi

nodes=${NNODES:-${PET_NNODES:-1}}
index=${JOB_COMPLETION_INDEX:-0}
if [ "$nodes" = 1 ]; then index=0; fi # each pod of the job is a run of its own
node=${NODE_RANK:-${PET_NODE_RANK:-$index}}
address=${MASTER_ADDR:-${PET_MASTER_ADDR:-127.0.0.1}}
port=${MASTER_PORT:-${PET_MASTER_PORT:-29500}}
processes=${NPROC:-${PET_NPROC_PER_NODE:-}}
if [ -z "$processes" ] || [ "$processes" = auto ] || [ "$processes" = gpu ]; then
  gpus=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU' || true)
  processes=$((gpus > 0 ? gpus : 1))
elif [ "$processes" = cpu ]; then
  processes=$(getconf _NPROCESSORS_ONLN)
fi
if [ "$nodes" != 1 ] && [ "$address" = 127.0.0.1 ] && [ -z "${PET_RDZV_ENDPOINT:-}" ]; then
  echo "error: $nodes nodes need MASTER_ADDR, the host name of node 0" >&2
  exit 2
fi
elastic=
case $nodes in *:*) elastic=1 ;; esac
if [ "$nodes" != 1 ] && [ -z "$elastic" ] && [ -z "${NODE_RANK:-${PET_NODE_RANK:-${JOB_COMPLETION_INDEX:-}}}" ] && [ -z "${PET_RDZV_ENDPOINT:-}" ]; then
  echo "error: $nodes nodes need NODE_RANK, 0 on the first, 1 on the next, …" >&2
  exit 2
fi

# torchrun gives each process one thread by default. On a node without GPUs, cores would be idle.
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}
where=(--nnodes "$nodes" --nproc_per_node "$processes")
if [ -n "$elastic" ]; then
  set -- "$@" train.resume=auto
  # torchrun's own store outlives a restart, and old entries would mislead the new processes.
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
# torchrun itself reads the rendezvous of Kubeflow (PET_RDZV_*). An address would contradict it.
if [ -n "$elastic" ] && [ -z "${PET_RDZV_ENDPOINT:-}" ]; then
  where+=(--rdzv_backend c10d --rdzv_endpoint "$address:$port" --rdzv_id "${SLURM_JOB_ID:-scaleup}")
  where+=(--rdzv_conf "last_call_timeout=${LAST_CALL:-30}" --max_restarts "${RESTARTS:-10}")
elif [ -z "${PET_RDZV_ENDPOINT:-}" ]; then
  where+=(--node_rank "$node" --master_addr "$address" --master_port "$port")
fi
# A run that receives a signal saves first. By default torchrun allows 30 s for that, and it dies of
# SIGUSR1 instead of forwarding it.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
where+=(--signals_to_handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
exec "$PYTHON" -m torch.distributed.run "${where[@]}" "$home/launch/train.py" --config "$config" "$@"
