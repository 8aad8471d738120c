#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most eight minutes and without a network: build the library for the
# GPU that is there, run its tests, compare bits, watch the memory, and measure updates, and a training step that averages
# follow. Without a GPU, or with --dry: all that goes without, on tiny workloads.
#
#   bash bench/gpu_report.sh OUT [--dry]
#
# OUT gets gpu.json, gpu.png and logs (dry.json and dry.png from a dry run). Ends with 1 if anything failed; a bar that
# is missed is in the report and is no failure.
set -uo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
  echo "usage: bash bench/gpu_report.sh OUT [--dry]" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH="$PWD" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# What is measured is the clone, whatever the user has set for their own runs.
unset SWAFAST_BACKEND SWAFAST_LIBRARY

python=
for candidate in ${PYTHON:+"$PYTHON"} python3 python; do
  if "$candidate" -c "import torch" 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [[ -z $python ]]; then
  echo "no python with torch: set PYTHON" >&2
  exit 2
fi

missing=$("$python" - <<'END'
from importlib.util import find_spec
print(*(name for name in ("pytest", "pytest_benchmark", "typer", "rich", "matplotlib") if find_spec(name) is None))
END
)
if [[ -n $missing ]]; then
  echo "$python lacks $missing: pip install '.[test]'" >&2
  exit 2
fi

began=$(mktemp)
rm -f "$out/failed.json"
trap 'rm -f "$began"; [[ -z $(jobs -p) ]] || kill $(jobs -p) 2>/dev/null' EXIT
trap 'exit 143' TERM INT
# The run keeps to its own time; this is for one that hangs all the same.
limit=()
command -v timeout >/dev/null && limit=(timeout --signal=INT --kill-after=20 490)
"${limit[@]}" "$python" -m bench gpu --out "$out" --checks "$@" &
wait $!
code=$?
if [[ ! $out/gpu.json -nt $began && ! $out/dry.json -nt $began ]]; then
  echo "{\"failed\": \"no report was written: the run ended with code $code\"}" >"$out/failed.json"
  [[ $code -ne 0 ]] || code=1
fi
exit "$code"
