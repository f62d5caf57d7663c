#!/usr/bin/env bash
# Make .venv and install the locked CPU environment and this checkout into it.  A second call finds its stamp and installs nothing.
#
#   scripts/setup.sh          what a run needs          scripts/setup.sh --dev    with the test tools
#   PYTHON=/path/to/python3.12 scripts/setup.sh         which Python (3.11 or 3.12; default: the first one found)
#   VENV=folder scripts/setup.sh                        where (default: .venv in the checkout)
#
# The whole log is in .venv/setup.log.  On a machine with GPUs use your own environment: see CONTRIBUTING.md.
set -euo pipefail
unset PYTHONDONTWRITEBYTECODE # without cached bytecode every process compiles torch again: half a minute each
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}
UV_VERSION=0.13.8
DEV=; [[ "${1:-}" == "--dev" ]] && DEV=1
SECONDS=0

say() { printf '[setup] %s\n' "$*"; }
stop() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }
# addresses in a tool's messages may be private: they are cut before anything is kept or shown
clean() { sed -uE "s#[a-z+]+://[^ '\"<>)]*#<address>#g; s#host='[^']*'#host=<address>#g; s#(ooking in (indexes|links):).*#\1 <address>#"; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3 python}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

[[ "$(uname -s)-$(uname -m)" == "Linux-x86_64" ]] ||
    stop "the lock is for Linux on x86_64, this is $(uname -s) on $(uname -m); install by hand: pip install -e '.[cpu]' (see CONTRIBUTING.md)"
PY=$(find_python) || stop "no Python 3.11 or 3.12 with the venv module${PYTHON:+ at PYTHON=$PYTHON}; install one (Debian: apt install python3.11-venv) or set PYTHON=/path/to/python3.11"
VERSION=$("$PY" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
LOCKS=(requirements/cpu.txt)
[[ -n "$DEV" ]] && LOCKS+=(requirements/dev.txt)

fingerprint() { { echo "$VERSION uv=$UV_VERSION $PWD"; cat "$@" pyproject.toml setup.py; } | sha256sum | cut -d' ' -f1; }
STAMP="$VENV/.setup${DEV:+-dev}"
WANTED=$(fingerprint "${LOCKS[@]}")
if [[ -x "$VENV/bin/posttrain" && "$(cat "$STAMP" 2>/dev/null)" == "$WANTED" ]]; then
    say "$VENV is up to date (Python $VERSION): nothing to install"
    exit 0
fi

if ! "$VENV/bin/python" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$VERSION')" >/dev/null 2>&1; then
    say "making $VENV with Python $VERSION"
    "$PY" -m venv --clear "$VENV"
fi
LOG="$VENV/setup.log"
: >"$LOG"
rm -f "$VENV/.setup" "$VENV/.setup-dev"
BACKGROUND=
trap '[[ -n "$BACKGROUND" ]] && kill "$BACKGROUND" 2>/dev/null || true' EXIT
quietly() { "$@" 2>&1 | clean >>"$LOG"; }
failed() { printf '[setup] the last lines of %s:\n' "$LOG" >&2; tail -n 15 "$LOG" >&2; stop "$*"; }

PIP=("$VENV/bin/python" -m pip --disable-pip-version-check --no-input)
quietly "${PIP[@]}" install --no-compile "uv==$UV_VERSION" || failed "could not install uv with pip; is a package index reachable?"
# uv does not read pip's configuration: hand it the two settings without which a mirror cannot be used
INDEX=${PIP_INDEX_URL:-$("${PIP[@]}" config get global.index-url 2>/dev/null || true)}
[[ -n "$INDEX" && -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]] && export UV_DEFAULT_INDEX="$INDEX"
CERT=${PIP_CERT:-$("${PIP[@]}" config get global.cert 2>/dev/null || true)}
[[ -n "$CERT" && -z "${SSL_CERT_FILE:-}" ]] && export SSL_CERT_FILE="$CERT"
export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-300} UV_NO_PROGRESS=1
UV=("$VENV/bin/uv" pip install --python "$VENV/bin/python" --no-deps)

TORCH=$(grep '^torch==' requirements/cpu.txt)
install_torch() {
    "$VENV/bin/python" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch') != '${TORCH#*==}')" 2>/dev/null && return
    # as pip is configured here; else from PyTorch's own index of CPU builds
    quietly "${PIP[@]}" install --no-deps --no-compile "$TORCH" && return
    quietly "${PIP[@]}" install --no-deps --no-compile --index-url https://download.pytorch.org/whl/cpu "$TORCH"
}
COUNT=$(cat "${LOCKS[@]}" | wc -l)
say "installing $COUNT locked packages (about 700 MB to download the first time, two to four minutes)"
install_torch &
BACKGROUND=$!
quietly "${UV[@]}" -r <(cat "${LOCKS[@]}" | grep -v '^torch==') || failed "could not install requirements/*.txt"
say "packages installed ($SECONDS s), waiting for $TORCH"
wait "$BACKGROUND" || failed "could not install $TORCH: neither pip's configured index nor download.pytorch.org had it"
BACKGROUND=
quietly "${UV[@]}" --no-build-isolation -e . || failed "could not install this checkout"
echo "$WANTED" >"$STAMP"
[[ -n "$DEV" ]] && fingerprint requirements/cpu.txt >"$VENV/.setup"
say "done in $SECONDS s: $VENV (Python $VERSION)"
