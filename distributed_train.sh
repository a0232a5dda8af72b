#!/usr/bin/env bash
# Train on several devices: torchrun with the train_rs.py beside this script.
set -euo pipefail

usage() {
    cat >&2 <<'END'
usage: distributed_train.sh PROCESSES [ARGUMENT OF train_rs.py ...]

    ./distributed_train.sh 8 --model rs_resnet18 --data-dir /data/imagenet

On several machines, run it on each of them with
    NNODES       how many machines (1)
    NODE_RANK    which one this is, from 0 (0)
    MASTER_ADDR  the address of machine 0
    MASTER_PORT  a free port there (29500)
END
    exit 2
}

[[ ${1:-} =~ ^[1-9][0-9]*$ ]] || usage
processes=$1
shift

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
nnodes=${NNODES:-1}

if [[ -n ${MASTER_ADDR:-} || -n ${MASTER_PORT:-} || $nnodes != 1 ]]; then
    if [[ $nnodes != 1 && -z ${MASTER_ADDR:-} ]]; then
        echo "distributed_train.sh: NNODES=$nnodes needs MASTER_ADDR" >&2
        usage
    fi
    rendezvous=(
        --nnodes="$nnodes" --node_rank="${NODE_RANK:-0}"
        --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-29500}"
    )
else
    rendezvous=(--standalone)  # a free port of its own, so that two runs on one machine do not meet
fi

exec torchrun --nproc_per_node="$processes" "${rendezvous[@]}" "$here/train_rs.py" "$@"
