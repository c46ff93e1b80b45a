#!/bin/sh
# Runs a GPU benchmark on a machine that has this tree, what prepare_gpu.sh made in .peers, torch, and no network.
#   benchmarks/gpu.sh OUTDIR step   [words of gpu_step.py]         e.g. gpu.sh "$OUT" step --seconds 540 --only 8b-4x2048
#   benchmarks/gpu.sh OUTDIR first  [words of gpu_first_step.py]
#   benchmarks/gpu.sh OUTDIR parity [words of gpu_parity.py]
#   benchmarks/gpu.sh OUTDIR ranks  [words of gpu_ranks.py]        on two GPUs
#   benchmarks/gpu.sh OUTDIR profile [words of gpu_profile.py]
#   benchmarks/gpu.sh OUTDIR serve [words of serve_gpu.py]
#   benchmarks/gpu.sh OUTDIR tests  [words of pytest]
#   benchmarks/gpu.sh OUTDIR keep   keeps the pieces of the base that came this time, for a later call on this machine
# Results begin from those in benchmarks/results, add up over calls on one machine, and lie in OUTDIR with the log; take
# them home with: python -m benchmarks.gpu.adopt OUTDIR
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:?folder for results}
what=${2:?step, first, parity, profile, serve, ranks, tests or keep}
shift 2
python=${PYTHON:-python3}
kept=${TMPDIR:-/tmp}/tenon-gpu
mkdir -p "$out" "$kept/results"

# unpack NAME: a folder of packages, once a machine.
unpack() {
  if [ ! -d "$kept/$1" ] && [ -f "$root/.peers/$1.tar.xz" ]; then
    mkdir -p "$kept/$1.part"
    xz -dc -T0 "$root/.peers/$1.tar.xz" | tar -C "$kept/$1.part" -xf -
    mv "$kept/$1.part" "$kept/$1"
  fi
}

keep_base() {
  mkdir -p "$kept/base"
  for piece in "$root"/.peers/base/*; do
    if [ -f "$piece" ]; then cp "$piece" "$kept/base/"; fi
  done
}

# run NAME WORD…: one script. It writes into OUTDIR after every process, so that a call that is killed loses nothing.
run() {
  name=$1
  shift
  for earlier in "$root/benchmarks/results/$name.json" "$kept/results/$name.json"; do
    if [ -f "$earlier" ]; then cp "$earlier" "$out/"; fi
  done
  status=0
  "$python" "$root/benchmarks/$name.py" --results "$out/$name.json" --log "$out/$name.log" "$@" || status=$?
  if [ -f "$out/$name.json" ]; then cp "$out/$name.json" "$kept/results/"; fi
  return $status
}

unpack ours
PYTHONPATH=$root/src:$root:$kept/ours
PYTHONUNBUFFERED=1
TENON_HOME=${TENON_HOME:-$kept/home}
TENON_OFFLINE=1
export PYTHONPATH PYTHONUNBUFFERED TENON_HOME TENON_OFFLINE
case $what in
  step | first)
    unpack peers
    if [ "$what" = step ]; then name=gpu_step; else name=gpu_first_step; fi
    run $name --peer-path "$kept/peers" --work-folder "$kept/work" "$@"
    ;;
  parity)
    keep_base
    cat "$kept"/base/? > "$kept/smollm2-135m.gguf"
    run gpu_parity --base "$kept/smollm2-135m.gguf" "$@"
    ;;
  profile) run gpu_profile "$@" ;;
  serve) run serve_gpu "$@" ;;
  ranks) run gpu_ranks "$@" ;;
  tests) run gpu_tests "$@" ;;
  keep) keep_base && ls -la "$kept/base" ;;
  *) echo "$what is none of step, first, parity, profile, serve, ranks, tests, keep" >&2 && exit 2 ;;
esac
