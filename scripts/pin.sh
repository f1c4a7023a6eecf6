#!/usr/bin/env bash
# Writes constraints.txt anew: the versions that pip chooses today, given those named here.
#
#   scripts/pin.sh torch==2.13.0     keeps torch, takes the newest of everything else
#
# Run it with the lowest Python that pyproject.toml allows, so that the versions serve every newer
# one too; then run `make test`, and commit the file only if that passes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ $# -gt 0 ]] || { sed -n '2,7s/^# \?//p' "$0" >&2; exit 2; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
printf '%s\n' "$@" >"$scratch/keep.txt"
"${PYTHON:-python3}" -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --constraint "$scratch/keep.txt" --editable '.[dev]'

{
    echo "# Versions that the tests pass with: of what pyproject.toml asks for, and of all that this"
    echo "# brings along. Made by: scripts/pin.sh $* ($("$scratch/venv/bin/python" --version))"
    # A local label such as +cpu names one build of a version; any build of it will do.
    "$scratch/venv/bin/python" -m pip freeze --exclude-editable | sed 's/+[^+]*$//'
} >"$scratch/constraints.txt"
mv "$scratch/constraints.txt" constraints.txt
