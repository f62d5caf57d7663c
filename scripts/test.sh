#!/usr/bin/env bash
# Set up with the test tools, then ruff and the tests.  Arguments go to pytest; FAST=1 leaves out what is marked slow.
#   scripts/test.sh                    everything that can run on this machine
#   FAST=1 scripts/test.sh -x          without the slow ones, stop at the first failure
#   scripts/test.sh tests/loss -k clip
# Without arguments the claims of tests/outcomes, which are computed on one core, run beside the rest and are printed behind it.
# The last line is pytest's own closing line; the exit code is pytest's, or ruff's when only ruff objects.
set -uo pipefail
unset PYTHONDONTWRITEBYTECODE # without cached bytecode every process compiles torch again: half a minute each
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$here" || exit 1
bash scripts/setup.sh --dev || exit 1
bin="${VENV:-.venv}/bin"
# one thread per process: the cores are shared by several engines, and sums do not depend on how many there are
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=offline RAY_USAGE_STATS_ENABLED=0
"$bin/ruff" check .
lint=$?
[[ $lint -eq 0 ]] || echo "ruff objects (above): this run fails whatever the tests say"
select=()
[[ -n "${FAST:-}" ]] && select=(-m "not slow")

# whatever the tests start carries this mark in its environment, also in sessions of its own, so nothing is left running
mark="POSTTRAIN_TESTS=$$-$(date +%s)"
sweep() {
    local signal pid found
    for signal in TERM KILL; do
        found=
        for pid in $(grep -lzxsF "$mark" /proc/[0-9]*/environ | cut -d/ -f3); do
            kill -"$signal" "$pid" 2>/dev/null && found=1
        done
        [[ -n "$found" ]] || return 0
        sleep 2
    done
}
rest=() beside='' told=''
set -m # the tests get a process group of their own, so an interrupt reaches them once and is not ignored
if [[ $# -eq 0 && -z "${FAST:-}" ]]; then
    rest=(--ignore=tests/outcomes) told="$(mktemp)"
    env "$mark" "$bin/python" -m pytest tests/outcomes >"$told" 2>&1 </dev/null &
    beside=$!
fi
env "$mark" "$bin/python" -m pytest ${select[@]+"${select[@]}"} ${rest[@]+"${rest[@]}"} "$@" </dev/null &
leader=$!
set +m
trap 'kill -INT -- "-$leader" ${beside:+"-$beside"} 2>/dev/null; sleep 5; sweep; exit 130' INT TERM
wait "$leader"
code=$?
if [[ -n "$beside" ]]; then
    wait "$beside" || code=$?
    cat "$told" && rm -f "$told"
fi
sweep
[[ $code -eq 0 ]] && code=$lint
exit "$code"
