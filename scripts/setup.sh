#!/usr/bin/env bash
# Installs what the Makefile's targets need: Elixir, and this package with its extras in .venv.
#
# A finished run leaves .venv/.setup, which says what it was made from. While that is still true
# the script ends at once; a .venv without it is unfinished, and is made anew.
#
#   PYTHON=python3.12   the interpreter to make .venv with (default: the first that is new enough)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly stamp=.venv/.setup
readonly log=.make/setup.log

step() {
    printf 'setup: %s\n' "$*"
}

fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# Keeps a command's output out of sight unless the command fails.
quietly() {
    printf '\n$ %s\n' "$*" >>"$log"
    "$@" >>"$log" 2>&1 </dev/null && return
    tail -n 40 "$log" >&2
    fail "failed: $* (all of its output is in $log)"
}

# Fails where there is no apt-get, so that the caller can say what to do instead.
apt_install() {
    local as_root=()
    command -v apt-get >/dev/null || return
    if [[ $(id -u) -ne 0 ]]; then
        command -v sudo >/dev/null || fail "run this as root, then try again: apt-get install $*"
        as_root=(sudo)
    fi
    step "installing $* with apt-get"
    quietly "${as_root[@]}" apt-get update
    quietly "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install --yes --no-install-recommends "$@"
    hash -r
}

elixir_is_new_enough() {
    command -v elixir >/dev/null && command -v mix >/dev/null && elixir -e '
        new = Version.match?(System.version(), ">= 1.14.0")
        unless new and System.otp_release() >= "25", do: System.halt(1)' >>"$log" 2>&1
}

install_elixir() {
    elixir_is_new_enough && return
    command -v elixir >/dev/null || apt_install elixir || true
    elixir_is_new_enough && return
    fail "Elixir 1.14 or newer on Erlang/OTP 25 or newer is needed, and elixir on PATH is" \
        "$(elixir --version 2>/dev/null | tail -n 1 | grep . || echo 'not there'). The package" \
        "elixir of Debian 12 or Ubuntu 24.04 will do; so will any other that is put on PATH."
}

python_is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >>"$log" 2>&1
}

# Sets $python.
choose_python() {
    local candidates=(python3 python3.14 python3.13 python3.12 python3.11)
    [[ ${PYTHON:-} ]] && candidates=("$PYTHON")
    for python in "${candidates[@]}"; do
        python_is_new_enough "$python" && return
    done
    [[ -z ${PYTHON:-} ]] && apt_install python3 python3-venv && python=python3 &&
        python_is_new_enough python3 && return
    fail "Python 3.11 or newer is needed, and ${PYTHON:-python3} is" \
        "$("${PYTHON:-python3}" --version 2>/dev/null || echo 'not there')." \
        "Install one, or say where it is: make PYTHON=/path/to/python3.12 ..."
}

make_venv() {
    # Debian keeps these two modules in a package of their own.
    "$python" -c 'import ensurepip, venv' >>"$log" 2>&1 ||
        apt_install "$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" ||
        fail "$python lacks the modules venv and ensurepip, without which it cannot make .venv." \
            "Install them, or say which Python has them: make PYTHON=/path/to/python3.12 ..."
    [[ -L .venv ]] && fail ".venv is a link to $(readlink .venv), which may serve others, and is not made for" \
        "this checkout; remove the link, or set up where it leads."
    [[ -e .venv ]] && step "the .venv that is here is unfinished, or not made for this: replacing it"
    quietly "$python" -m venv --clear .venv
}

# What an installation depends on, as one line.
inputs() {
    printf '%s %s\n' "$(command -v elixir)" "$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum)"
}

made=()
[[ -f $stamp ]] && mapfile -t made <"$stamp"
made_at=${made[0]:-} made_with=${made[1]:-} made_from=${made[2]:-}

# A virtual environment holds absolute paths: it does not survive a move of the repository.
venv_is_good() {
    [[ -x .venv/bin/python && $made_at == "$PWD" && ${PYTHON:-$made_with} == "$made_with" ]]
}

if venv_is_good && [[ $made_from == "$(inputs)" ]]; then
    exit 0
fi

mkdir -p .make
: >"$log"
install_elixir
if venv_is_good; then
    python=$made_with
else
    choose_python
    make_venv
fi
rm -f "$stamp"
step "installing the package into .venv (the first time some minutes, for PyTorch is large)"
quietly .venv/bin/python -m pip install --disable-pip-version-check \
    --constraint constraints.txt --editable '.[dev]'
# The oldest SDK that pyproject.toml allows, to be laid over the one of .venv by PYTHONPATH.
lowest=$(sed -n 's/^ *"tinker>=\(.*\)",$/\1/p' pyproject.toml)
rm -rf .venv/tinker-lowest
quietly .venv/bin/python -m pip install --disable-pip-version-check --no-deps \
    --target .venv/tinker-lowest "tinker==$lowest"
printf '%s\n' "$PWD" "$python" "$(inputs)" >"$stamp.part"
mv "$stamp.part" "$stamp"
step "done in $SECONDS s: $(elixir --version | tail -n 1), $(.venv/bin/python --version)"
