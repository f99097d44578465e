#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes on a bare machine without a network:
#
#   tools/gpu_check.sh [--dry-run] [--out FOLDER]
#
# Builds and installs into a folder of its own, runs the GPU tests, a fine-tuning at the paper's
# sizes, the benchmarks, and compute-sanitizer on the smallest cases. Every step has a time limit of
# its own, and one that fails does not hide the next. Leaves FOLDER/gpu_check.log and
# FOLDER/<device>.json (FOLDER is benchmarks/results if not given), prints a table last, and fails if
# a step failed.
#
# --dry-run: the same steps on the CPU at small sizes, without installing or writing a result.
#
# Planned minutes: build 2, tests 1.5, fine-tuning 1.7, benchmarks 2, sanitizer 1. Limits are a
# little above, and no step goes on after 530 s.
set -u
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}" MAX_JOBS="${MAX_JOBS:-16}"

python="${PYTHON:-python3}" out="" dry="" total=530
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry=1 ;;
    --out) out="${2:?--out needs a folder}" && shift ;;
    *) echo "usage: tools/gpu_check.sh [--dry-run] [--out FOLDER]" >&2 && exit 2 ;;
  esac
  shift
done
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
[ -z "$out" ] && out="${dry:+$work}" && out="${out:-benchmarks/results}"
mkdir -p "$out" && out="$(cd "$out" && pwd)" || exit 2
log="$out/gpu_check.log"
: >"$log"
commit="$(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
begin=$(date +%s) table="" bad=0

say() { echo "$*" | tee -a "$log"; }
row() { table+="$(printf '%-14s %-12s %s' "$@")"$'\n'; }

skip() {
  say "== $1: skipped, $2"
  row "$1" skipped "$2"
}

# step NAME LIMIT COMMAND...: runs it within LIMIT seconds and what is left of the total.
step() {
  local name="$1" limit="$2" start left code
  shift 2
  start=$(date +%s)
  left=$((total - (start - begin)))
  if [ "$left" -lt 5 ]; then
    row "$name" "no time" "" && bad=1
    return 1
  fi
  [ "$limit" -gt "$left" ] && limit="$left"
  say "== $name ($limit s at most): $*"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$log" | tail -n 40
  code=${PIPESTATUS[0]}
  case "$code" in
    0) code=ok ;;
    124 | 137) code=time-out bad=1 ;;
    *) code="failed ($code)" bad=1 ;;
  esac
  row "$name" "$code" "$(($(date +%s) - start)) s"
  say "== $name: $code"
}

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

pytest=("$python" -m pytest -q -p no:cacheprovider)
device=cpu more=(--tiny) iterations=2
if [ -n "$dry" ]; then
  skip build "dry run"
  step tests 280 "${pytest[@]}" tests/test_denoise_chain_cluster.py -k "tiling or barrier"
else
  device=cuda more=() iterations=768
  export PATH="$PATH:/usr/local/cuda/bin"
  {
    echo "commit $commit"
    "$python" -c 'import sys, torch; print("python", sys.version, "torch", torch.__version__)'
    "$python" -c 'import triton; print("triton", triton.__version__)'
    nvcc --version | tail -n 1
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  } >>"$log" 2>&1
  step build 200 bash -c build
  # Tests and benchmarks of this tree, on the package as it was installed.
  mkdir -p "$work/run" && cp -r tests benchmarks tools csrc kernels pyproject.toml "$work/run/"
  cd "$work/run" && export PYTHONPATH="$work/installed${PYTHONPATH:+:$PYTHONPATH}"
  "$python" -c 'import xdist' 2>/dev/null && pytest+=(-n 8) # compiles of Triton kernels in parallel
  mapfile -t files < <(grep -lE 'mark\.gpu|variants\(' tests/test_*.py)
  step tests 130 "${pytest[@]}" -m gpu "${files[@]}"
fi

step finetune 110 "$python" -m benchmarks.gpu_finetune --device "$device" "${more[@]}" \
  --seconds 75 --iterations "$iterations" --out "$work/finetune.json"
step finetune-tf32 40 "$python" -m benchmarks.gpu_finetune --device "$device" "${more[@]}" \
  --tf32 --seconds 15 --iterations $((iterations < 50 ? 1 : 50)) --out "$work/finetune_tf32.json"
step benchmarks 150 "$python" -m benchmarks.gpu --device "$device" "${more[@]}" \
  --seconds 120 --out "$work/operators.json"

if [ -n "$dry" ]; then
  skip sanitizer "dry run"
elif ! command -v compute-sanitizer >/dev/null; then
  skip sanitizer "compute-sanitizer is not installed"
else
  for tool in memcheck racecheck; do
    step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "$python" -m pytest -q -p no:cacheprovider -m gpu -k "smallest or (test_gates and 31)" \
      tests/test_denoise_chain_cluster.py tests/test_gru_cell.py
  done
fi

# One file of what was measured: the fine-tuning beside the operators.
"$python" - "$work" "$out" "$commit" "$dry" <<'PYTHON' | tee -a "$log"
import json
import sys
from pathlib import Path

work, out, commit, dry = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
parts = {n: work / f"{n}.json" for n in ("operators", "finetune", "finetune_tf32")}
read = {n: json.loads(p.read_text()) for n, p in parts.items() if p.exists()}
if not read:
    raise SystemExit("nothing was measured")
result = read.get("operators", {"meta": {"device": "unknown"}, "items": []})
result["meta"]["commit"] = commit
tuning = read.get("finetune", {})
result["finetune_full"] = tuning.pop("finetune_full", None)
result["imagined_steps_per_s"] = tuning.get("rollout_imagined_steps_per_s")
result["finetune"] = tuning
result["finetune_tf32"] = read.get("finetune_tf32", {})
path = out / f"{result['meta']['device']}.json"
if dry:
    print("dry run: no result is written")
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
for name in ("finetune", "finetune_tf32"):
    for key, value in result[name].items():
        print(f"{name + ' ' + key:<40}{value}")
print(f"{'finetune_full':<40}{result['finetune_full'] or 'not all iterations were run'}")
PYTHON

say ""
say "$table"
say "$(($(date +%s) - begin)) s in all${dry:+ (dry run)}; log: $log"
exit "$bad"
