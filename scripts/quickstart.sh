#!/usr/bin/env bash
# From a fresh checkout to a trained model: set up, then a small model learns on this machine.  Settings are passed on:
#   scripts/quickstart.sh seed=1 stages.grpo.steps=50
set -euo pipefail
unset PYTHONDONTWRITEBYTECODE # without cached bytecode every process compiles torch again: half a minute each
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
bash "$here/scripts/setup.sh"
cd "$here"
exec "${VENV:-.venv}/bin/posttrain" train recipe=quickstart "$@"
