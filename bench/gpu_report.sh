#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most nine minutes and without a network: build the library for the
# GPU that is there, compare bits, measure updates, run the tests, time a training step, and watch the memory. Without a
# GPU, or with --dry, it does all that needs none, on tiny workloads.
#
#   bash bench/gpu_report.sh OUT [--dry] [--library FILE]
#
# FILE, or else SWAFAST_LIBRARY, is a native library that was built elsewhere. It is used where cmake or nvcc fails.
# OUT gets gpu.json, gpu.png, gpu.samples.jsonl and logs (dry.json and so on from a dry run). The JSON is replaced after
# every part, so a run that is killed leaves what it has measured. The command returns 1 if anything failed. A bar that
# is missed is in the report and is no failure.
set -uo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
  echo "usage: bash bench/gpu_report.sh OUT [--dry] [--library FILE]" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
shift
options=()
[[ -z ${SWAFAST_LIBRARY:-} ]] || options=(--library "$(realpath "$SWAFAST_LIBRARY")")
while [[ $# -gt 0 ]]; do
  case $1 in
    --dry) options+=(--dry) ;;
    --library) shift && options+=(--library "$(realpath "${1:?--library needs a file}")") ;;
    *) echo "unknown option: $1" >&2 && exit 2 ;;
  esac
  shift
done
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH="$PWD" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
# The clone is measured, whatever the user has set for their own runs.
unset SWAFAST_BACKEND SWAFAST_LIBRARY

python=${PYTHON:-python3}
"$python" - <<'END' || exit 2
import sys
from importlib.util import find_spec

wanted = ("torch", "pytest", "pytest_benchmark", "typer", "rich", "matplotlib")
missing = [name for name in wanted if find_spec(name) is None]
if missing:
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}: set PYTHON, or pip install '.[test]'")
END

began=$(mktemp)
rm -f "$out/failed.json"
trap 'rm -f "$began"; [[ -z $(jobs -p) ]] || kill $(jobs -p) 2>/dev/null' EXIT
trap 'exit 143' TERM INT
# The run keeps to its own time; this is for one that hangs all the same.
limit=()
command -v timeout >/dev/null && limit=(timeout --signal=INT --kill-after=8 528)
"${limit[@]}" "$python" -m bench gpu --out "$out" "${options[@]}" &
wait $!
code=$?
if [[ ! $out/gpu.json -nt $began && ! $out/dry.json -nt $began ]]; then
  echo "{\"failed\": \"no report was written: the run ended with code $code\"}" >"$out/failed.json"
  [[ $code -ne 0 ]] || code=1
fi
exit "$code"
