#!/usr/bin/env bash
# TensorRT 8.6 plans of small and large on an offline GPU machine, beside PyTorch, and behind a real tritonserver.
#
#   bash perf/h200/tensorrt.sh OUT [SECONDS] [STEP...]
#
# STEP is export, plans, serve or report; by default all of them, in one call. Where a call's time is short, one call a
# step does the same: what a step leaves lies in $WORK (/tmp/mtgr-tensorrt).
#
# Expects, as the machine's unpacking script leaves them under $H200 (/tmp/h200): a Python 3.10 with TensorRT 8.6
# (trt/python, trt/lib, trt/tensorrt) and the packages of a server (site). OUT gets the report, logs, and the plans'
# own results; SECONDS (420) is the time in which builds are begun. DRY=1 runs all of it on a CPU with this Python.
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd) seconds=${2:-420} steps=("${@:3}")
if ((${#steps[@]} == 0)); then steps=(export plans report serve report); fi  # what was measured is kept, served or not
base=${H200:-/tmp/h200} python=${PYTHON:-python3} work=${WORK:-/tmp/mtgr-tensorrt}
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-8} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
dry=() stub=()
if [[ -n ${DRY:-} ]]; then
  dry=(--dry-run)
  plans() { "$python" -m perf.tensorrt_plans "$@" --dry-run; }
else
  cudart=$("$python" -c 'import glob, sysconfig; f = glob.glob(sysconfig.get_path("purelib") + "/nvidia/**/libcudart.so*", recursive=True); print(f[0] if f else "")')
  mkdir -p "$base/cudart"
  if [[ -n $cudart ]]; then ln -sf "$cudart" "$base/cudart/libcudart.so"; fi
  # The names by which Plan and Triton's stub find Python 3.10, TensorRT, and the CUDA runtime.
  export MTGR_TRT_PYTHONHOME=$base/trt/python MTGR_TRT_PYTHONPATH=$base/trt MTGR_CUDART=$base/cudart/libcudart.so
  export MTGR_TRT_LD_LIBRARY_PATH=$base/trt/python/lib:$base/trt/lib:$base/trt/tensorrt
  plans() {
    LD_LIBRARY_PATH=$MTGR_TRT_LD_LIBRARY_PATH PYTHONHOME=$MTGR_TRT_PYTHONHOME PYTHONPATH=$PWD:$MTGR_TRT_PYTHONPATH \
      "$base/trt/python/bin/python3.10" -m perf.tensorrt_plans "$@"
  }
  found=$(find "$base/site" /usr/lib/python3* -path '*python_backend_stubs/3.10/triton_python_backend_stub' 2>/dev/null | head -n 1)
  if [[ -n $found ]]; then stub=(--stub "$found"); fi
fi
status=0
step() { "$python" -m perf.tensorrt_gpu "$@" --work "$work" "${dry[@]}" || status=1; }
for name in "${steps[@]}"; do
  case $name in
    export) step export ;;
    plans) plans --work "$work" --budget "$seconds" || status=1 ;;
    serve) step serve "${stub[@]}" ;;
    report) step report --out "$out/tensorrt.json" ;;
    *) echo "tensorrt.sh: there is no step $name" >&2; exit 2 ;;
  esac
done
# Few files, as few can be brought back.
for kind in server model; do
  find "$work" -name "*$kind.log" -exec tail -v -n 200 {} + >"$out/$kind-logs.txt"
done
exit "$status"
