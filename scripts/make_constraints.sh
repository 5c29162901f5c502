#!/usr/bin/env bash
# Resolve pyproject.toml's ranges in a throw-away environment and write the result to constraints.txt.
# torch keeps its pin, because the newest torch is a decision and not an accident: edit it in constraints.txt first.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

torch=$(grep '^torch==' constraints.txt)
"$python" -m venv "$scratch/venv"
pip() { "$scratch/venv/bin/python" -m pip --disable-pip-version-check "$@"; }
echo "resolving with $torch (a few minutes)"
pip install -qq "$torch"
pip install -qq "$torch" '.[dev]'

{
  sed -n '/^#/p' constraints.txt
  # Local build labels (+cpu, +cu130) go: the pin is the release, the index decides the build.
  pip freeze | grep '==' | sed 's/+[a-z0-9.]*$//' | sort -f
} > "$scratch/constraints.txt"
mv "$scratch/constraints.txt" constraints.txt
echo "constraints.txt: $(grep -c == constraints.txt) packages"
