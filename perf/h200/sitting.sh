#!/usr/bin/env bash
# All that is still to be measured on a GPU machine, in two lanes: one GPU and half of the cores each, or one after the other.
#
#   bash perf/h200/sitting.sh OUT
#
# Takes about 18 minutes with two GPUs, 25 with one; OUT/lanes.txt says what has ended, and how. Start it in the background where a
# call has a limit. Expects what the scripts beside it expect; TensorRT is left out where it is not unpacked. WHAT="large kpi"
# runs these alone, of: kpi large variants tensorrt parallel sanitizer gpu. DRY=1 prints the commands instead.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd) python=${PYTHON:-python3} what=${WHAT:-kpi large variants tensorrt parallel sanitizer gpu}
cd "$(dirname "$0")/../.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} CUDA_DEVICE_ORDER=PCI_BUS_ID
gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | wc -l) cores=$(nproc)
run() {
  local name=$1
  shift
  case " $what " in *" $name "*) ;; *) return ;; esac
  if [[ -n ${DRY:-} ]]; then
    echo "GPUs ${CUDA_VISIBLE_DEVICES:-all}, ${name}: $*"
    return
  fi
  mkdir -p "$out/$name"
  local begin=$SECONDS
  "$@" > "$out/$name/job.log" 2>&1
  echo "$name: status $? after $((SECONDS - begin)) s" >> "$out/lanes.txt"
}
first() {
  run kpi bash perf/h200/kpi.sh "$out/kpi" 420
}
second() {
  run large bash perf/h200/large_models.sh "$out/large" 400
  run variants timeout 120 "$python" -m perf.gpu_variants --d256
  if [[ -d ${H200:-/tmp/h200}/trt/tensorrt || -n ${DRY:-} ]]; then
    PLANS="large-retrieve-fp16-typed large-rank-fp16-b8 large-rank-fp16-b1" \
      run tensorrt bash perf/h200/tensorrt.sh "$out/tensorrt" 420 export build measure serve
  fi
}
lane() { # FIRST_CORE LAST_CORE GPU COMMAND
  CUDA_VISIBLE_DEVICES=$3
  export CUDA_VISIBLE_DEVICES
  taskset -pc "$1-$2" "$BASHPID" > /dev/null
  "$4"
}
if ((gpus > 1)); then
  lane 0 $((cores / 2 - 1)) 0 first &
  lane $((cores / 2)) $((cores - 1)) 1 second &
  wait
  run parallel timeout 240 "$python" -W ignore -m perf.vllm_parallel --out "$out/parallel" --variant fp8 --rounds 8
else
  first
  second
fi
run sanitizer timeout 230 compute-sanitizer "$python" -m perf.gpu --here --quick --section check --out "$out/sanitizer"
run gpu timeout 240 "$python" -m pytest -q tests/gpu
if [[ -f $out/lanes.txt ]]; then cat "$out/lanes.txt"; fi
