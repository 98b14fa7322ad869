#!/usr/bin/env bash
# The test suite on the oldest versions that requirements.txt promises, in a fresh environment; run by hand before a release.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
python3.11 -m venv "$fresh/venv"
export PATH="$fresh/venv/bin:$PATH"
sed 's/>=/==/' requirements.txt > "$fresh/oldest.txt"
pip install --quiet --requirement "$fresh/oldest.txt"
pip freeze --requirement "$fresh/oldest.txt" | sed '/^##/,$d'
tests=$(sed -n 's/^pip install -r requirements.txt && \(python -m pytest.*\)$/\1/p' README.md)
${tests:?no test command in README.md}
