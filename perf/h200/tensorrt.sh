#!/usr/bin/env bash
# TensorRT 8.6 plans of small and large on an offline GPU machine, beside PyTorch, and behind a real tritonserver.
#
#   bash perf/h200/tensorrt.sh OUT [SECONDS] [STEP...]
#
# PLANS="NAME NAME" leaves all other plans out (names: perf/tensorrt_entries.py). WAY_SECONDS is how long a plan may be
# built in one way before the next is tried.
#
# STEP is export, build, measure, serve or report; by default the first four, in one call. What a step leaves lies in
# $WORK (/tmp/mtgr-tensorrt): a later call may do the steps that are missing, and builds the plans that are.
#
# Expects, as the machine's unpacking script leaves them under $H200 (/tmp/h200): a Python 3.10 with TensorRT 8.6
# (trt/python, trt/lib, trt/tensorrt) and the packages of a server (site). OUT gets the report and logs after every step;
# SECONDS (570) is the time that the call may take. DRY=1 runs all of it on a CPU with this Python.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd) seconds=${2:-570} steps=("${@:3}")
if ((${#steps[@]} == 0)); then steps=(export build measure serve); fi
base=${H200:-/tmp/h200} python=${PYTHON:-python3} work=${WORK:-/tmp/mtgr-tensorrt}
begin=$(date +%s) end=$(($(date +%s) + seconds))
cd "$(dirname "$0")/../.." && mkdir -p "$work"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
dry=() stub=()
if [[ -n ${DRY:-} ]]; then
  dry=(--dry-run)
  plans() { "$python" -m perf.tensorrt_plans "$@" --work "$work" --dry-run; }
else
  cudart=$("$python" -c 'import glob, sysconfig; f = glob.glob(sysconfig.get_path("purelib") + "/nvidia/**/libcudart.so*", recursive=True); print(f[0] if f else "")')
  # The names by which Plan and Triton's stub find Python 3.10, TensorRT, and the CUDA runtime.
  export MTGR_TRT_PYTHONHOME=$base/trt/python MTGR_TRT_PYTHONPATH=$base/trt MTGR_CUDART=${cudart:-libcudart.so}
  export MTGR_TRT_LD_LIBRARY_PATH=$base/trt/python/lib:$base/trt/lib:$base/trt/tensorrt
  plans() {
    LD_LIBRARY_PATH=$MTGR_TRT_LD_LIBRARY_PATH${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} PYTHONHOME=$MTGR_TRT_PYTHONHOME \
      PYTHONPATH=$PWD:$MTGR_TRT_PYTHONPATH "$base/trt/python/bin/python3.10" -m perf.tensorrt_plans "$@" --work "$work"
  }
  found=$(find "$base/site/" /usr/lib/python3* -path '*python_backend_stubs/3.10/triton_python_backend_stub' 2>/dev/null | head -n 1)
  if [[ -n $found ]]; then stub=(--stub "$found"); else echo "tensorrt.sh: no stub of Triton for Python 3.10 was found" >&2; fi
fi
# Seconds that must be left when measuring and when builds end: PyTorch is timed before, and the report written.
serving=10
if [[ " ${steps[*]} " == *" serve "* ]]; then serving=80; fi
later=$((serving + 20))
if [[ " ${steps[*]} " == *" measure "* ]]; then later=$((later + 90)); fi
status=0 chosen=()
for name in ${PLANS:-}; do chosen+=(--plan "$name"); done
gpu() { "$python" -m perf.tensorrt_gpu "$@" --work "$work" "${dry[@]}"; }
say() { echo "== $(($(date +%s) - begin)) s: $*"; }
keep() {
  # Few files, as few can be brought back.
  gpu report --out "$out/tensorrt.json" || status=1
  for kind in server model; do
    find "$work" -name "*$kind.log" -exec tail -v -c 40000 {} + >"$out/$kind-logs.txt"
  done
}
for name in "${steps[@]}"; do
  say "$name"
  case $name in
    export) gpu export "${chosen[@]}" || status=1 ;;
    build)
      # PyTorch is compiled while plans are built, and timed when the GPU is free again.
      rm -f "$work/built"
      torch=
      if [[ ! -e $work/torch.json ]]; then
        TORCHINDUCTOR_COMPILE_THREADS=4 timeout "$((end - later + 40 - $(date +%s)))" "$python" -m perf.tensorrt_gpu torch --work "$work" \
          "${dry[@]}" --wait "$work/built" &
        torch=$!
      fi
      plans build --until "$((end - later))" --way-seconds "${WAY_SECONDS:-inf}" || status=1
      say "built"
      touch "$work/built"
      if [[ -n $torch ]]; then wait "$torch" || status=1; fi
      ;;
    measure) plans measure --until "$((end - serving))" || status=1 ;;
    serve) gpu serve --until "$((end - 30))" "${stub[@]}" || status=1 ;;
    report) ;;
    *) echo "tensorrt.sh: there is no step $name" >&2; exit 2 ;;
  esac
  if [[ $name != export ]]; then keep; fi
done
say "end, status $status"
exit "$status"
