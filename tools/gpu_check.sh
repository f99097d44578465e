#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes on a bare machine without a network:
#
#   tools/gpu_check.sh [--dry-run] [--out FOLDER]
#
# Builds and installs, runs the GPU tests, compute-sanitizer on the smallest cases, the benchmarks and
# a fine-tuning at the paper's sizes. Every step has a time limit of its own, and one that fails does
# not hide the next. Leaves FOLDER/gpu_check.log and FOLDER/<device>.json (benchmarks/results by
# default), prints a table last, and fails if a step failed.
#
# --dry-run: the same steps on the CPU at small sizes, without installing.
# Minutes: build 2.5, tests 1.5, sanitizer 1, benchmarks 2, fine-tuning 1.5; limits are a little
# above, and the steps together stop at 530 s.
set -u
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}" MAX_JOBS="${MAX_JOBS:-16}"

python="${PYTHON:-python3}" out=benchmarks/results dry="" total=530
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry=1 ;;
    --out) out="$2" && shift ;;
    *) echo "usage: tools/gpu_check.sh [--dry-run] [--out FOLDER]" >&2 && exit 2 ;;
  esac
  shift
done
mkdir -p "$out"
work="$(mktemp -d)"
log="$out/gpu_check.log"
trap 'rm -rf "$work"' EXIT
: >"$log"
begin=$(date +%s) table="" bad=0

say() { echo "$*" | tee -a "$log"; }

# step NAME LIMIT COMMAND...: runs it within LIMIT seconds and what is left of the total.
step() {
  local name="$1" limit="$2" start left code
  shift 2
  start=$(date +%s)
  left=$((total - (start - begin)))
  if [ "$left" -lt 5 ]; then
    table+="$(printf '%-12s %-10s %4s s' "$name" "no time" -)"$'\n'
    bad=1
    return 1
  fi
  [ "$limit" -gt "$left" ] && limit="$left"
  say "== $name ($limit s at most): $*"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$log" | tail -n 40
  code=${PIPESTATUS[0]}
  case "$code" in
    0) code="ok" ;;
    124 | 137) code="time-out" bad=1 ;;
    *) code="failed $code" bad=1 ;;
  esac
  table+="$(printf '%-12s %-10s %4s s' "$name" "$code" "$(($(date +%s) - start))")"$'\n'
  say "== $name: $code"
  [ "$code" = ok ]
}

skip() {
  say "== $1: skipped, $2"
  table+="$(printf '%-12s skipped: %s' "$1" "$2")"$'\n'
}

# Installed into a folder of its own, so that this very tree is tested whatever else is installed.
build() {
  DIWA_CUDA=ON "$python" -m pip install --no-build-isolation --no-deps --target "$work/installed" . ||
    return 1
  cd "$work" && PYTHONPATH="$work/installed" "$python" -c "
import diwa, diwa.kernels
from diwa._native import LOAD_ERRORS
print(diwa.__file__, *diwa.kernels.__path__, LOAD_ERRORS)
raise SystemExit(bool(LOAD_ERRORS))"
}
export -f build
export python work

mapfile -t tests < <(grep -lE 'mark\.gpu|variants\(' tests/test_*.py)

if [ -n "$dry" ]; then
  device=cpu more=(--tiny)
  skip build "dry run"
else
  device=cuda more=()
  command -v nvcc >/dev/null || export PATH="$PATH:/usr/local/cuda/bin"
  step build 200 bash -c build
  export PYTHONPATH="$work/installed${PYTHONPATH:+:$PYTHONPATH}"
  # the tests and benchmarks of this tree, the package as it was installed
  mkdir -p "$work/run" && cp -r tests benchmarks tools csrc pyproject.toml "$work/run/"
fi

{
  "$python" -c 'import torch, sys; print("torch", torch.__version__, "python", sys.version.split()[0])'
  "$python" -c 'import triton; print("triton", triton.__version__)'
  nvcc --version | tail -1
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
} >>"$log" 2>&1

here="$PWD"
case "$out" in /*) ;; *) out="$here/$out" ;; esac
case "$log" in /*) ;; *) log="$here/$log" ;; esac
[ -z "$dry" ] && cd "$work/run"

if [ -n "$dry" ]; then
  step tests 280 "$python" -m pytest -q -x -p no:cacheprovider tests/test_denoise_chain_cluster.py
  skip sanitizer "dry run"
else
  step tests 120 "$python" -m pytest -q -m gpu -p no:cacheprovider "${tests[@]}"
  sanitizer="$(command -v compute-sanitizer)"
  if [ -z "$sanitizer" ]; then
    skip sanitizer "compute-sanitizer is not installed"
  else
    for tool in memcheck racecheck; do
      step "$tool" 60 "$sanitizer" --tool "$tool" --error-exitcode 9 --target-processes all \
        "$python" -m pytest -q -m gpu -p no:cacheprovider -k "smallest or (test_gates and 31)" \
        tests/test_denoise_chain_cluster.py tests/test_gru_cell.py
    done
  fi
fi
step benchmarks 150 "$python" -m benchmarks.gpu --device "$device" "${more[@]}" \
  --seconds 120 --out "$work/operators.json"
iterations=768
[ -n "$dry" ] && iterations=2
step finetune 110 "$python" -m benchmarks.gpu_finetune --device "$device" "${more[@]}" \
  --seconds 75 --iterations "$iterations" --out "$work/finetune.json"

# One file of what was measured; the fine-tuning beside the operators.
"$python" - "$work" "$out" "$dry" <<'PYTHON' | tee -a "$log"
import json
import sys
from pathlib import Path

work, out, dry = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
parts = {n: work / f"{n}.json" for n in ("operators", "finetune")}
read = {n: json.loads(p.read_text()) for n, p in parts.items() if p.exists()}
if not read:
    raise SystemExit("nothing was measured")
result = read.get("operators", {"meta": {"device": "unknown"}, "items": []})
tuning = read.get("finetune", {})
result["finetune_full"] = tuning.pop("finetune_full", None)
result["imagined_steps_per_s"] = tuning.get("rollout_imagined_steps_per_s")
result["finetune"] = tuning
path = out / f"{result['meta']['device']}.json"
if dry:
    print(f"dry run: {path.name} is not written")
else:
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")
for item in result["items"]:
    name = f"{item['op']} {item['case']} {item['dtype']}"
    print(f"{name:<40}{1e6 * item['median_s']:10.1f} us {item['vs_original']:8.1f}x original "
          f"{item['vs_best_peer']:7.2f}x {item['best_peer']}")
for kind in ("failed", "skipped"):
    for entry in result.get("details", {}).get(kind, []):
        print(f"{kind}: {entry['item']}: {entry['reason'].splitlines()[0][:100]}")
for key, value in tuning.items():
    print(f"{key:<40}{value}")
print(f"{'finetune_full':<40}{result['finetune_full'] or 'not all iterations were run'}")
PYTHON

say ""
say "$table"
say "$(($(date +%s) - begin)) s in all; log: $log"
exit "$bad"
