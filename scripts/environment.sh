# Sourced by scripts/quickstart and scripts/test: one environment, installed once, from the pins of constraints.txt.
# shellcheck shell=bash

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${SVDTUNE_VENV:-$root/.venv}

# prepare [EXTRA]: makes $venv, installs the project with that extra when pins or pyproject changed, puts it on PATH.
prepare() {
    local extra=${1:-} stamp
    stamp=$(cat "$root/constraints.txt" "$root/pyproject.toml" | cksum)
    [ -x "$venv/bin/python" ] || make_venv
    if [ "$(cat "$venv/.installed-$extra" 2>/dev/null)" != "$stamp" ] &&
        { [ -n "$extra" ] || [ "$(cat "$venv/.installed-dev" 2>/dev/null)" != "$stamp" ]; }; then
        echo "installing into $venv (once; some minutes)" >&2
        pip_install "torch==$(torch_pin)"
        pip_install --editable "$root${extra:+[$extra]}"
        printf '%s\n' "$stamp" >"$venv/.installed-$extra"
    fi
    PATH="$venv/bin:$PATH"
}

make_venv() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            "$candidate" -m venv "$venv" && return
            rm -rf "$venv"
            echo "error: $candidate cannot make a virtual environment; install its venv module (Debian: apt install python3-venv)" >&2
            exit 2
        fi
    done
    echo "error: Python 3.11 or newer is needed, ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>&1); set PYTHON=/path/to/python" >&2
    exit 2
}

pip_install() {
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --constraint "$root/constraints.txt" "$@"
}

# The pinned torch; without an NVIDIA GPU its CPU build (a tenth of the size) where the configured sources offer one.
torch_pin() {
    local version
    version=$(sed -n 's/^torch==//p' "$root/constraints.txt")
    if ! nvidia-smi -L >/dev/null 2>&1 && pip_install --dry-run --no-deps "torch==$version+cpu" >/dev/null 2>&1; then
        version=$version+cpu
    fi
    echo "$version"
}
