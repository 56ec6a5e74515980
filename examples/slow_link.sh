#!/usr/bin/env bash
# The pipeline benchmark on two emulated devices with a slow link between them: two network namespaces joined by a
# cable of RATE each way, with next to no burst: 64 KB of it would be a head start of 5 ms for every message that
# follows a pause, which no cable gives. Needs root on Linux.
# Usage: examples/slow_link.sh [RATE] [options of the benchmark]
set -euo pipefail
rate=${1:-100mbit}
python=$(dirname "$0")/../.venv/bin/python

cleanup() { ip netns del bll0 2>/dev/null || true; ip netns del bll1 2>/dev/null || true; }
trap cleanup EXIT
cleanup
for i in 0 1; do ip netns add "bll$i"; done
ip link add cable0 netns bll0 type veth peer name cable1 netns bll1
for i in 0 1; do
    ip -n "bll$i" address add "10.77.0.$((i + 1))/24" dev "cable$i"
    ip -n "bll$i" link set "cable$i" up
    ip -n "bll$i" link set lo up
    ip netns exec "bll$i" tc qdisc add dev "cable$i" root tbf rate "$rate" burst 4kb latency 100ms
done

run() {
    ip netns exec "bll$1" env RANK="$1" WORLD_SIZE=2 MASTER_ADDR=10.77.0.1 MASTER_PORT=29511 OMP_NUM_THREADS=1 \
        "$python" -m blocklocal bench --pipeline --model devices --processes 2 --interface "cable$1" "${@:2}"
}
run 1 "${@:2}" &
run 0 "${@:2}"
wait
