#!/usr/bin/env bash
# The 8b preset through vLLM behind a real tritonserver on a GPU machine, in bf16 and fp8; parity of fp8, host offload.
#
#   bash perf/h200/large_models.sh OUT [SECONDS]
#
# Expects a Python with vLLM, PyTriton's tritonserver and the plugin's entry point, and room for 20 GB in TMPDIR
# (/dev/shm). OUT gets a JSON file of each section as soon as it is done, and the logs; SECONDS (290) is the time that the
# call may take. DRY=1 runs all of it on a CPU with a tiny network.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd) limit=${2:-290} python=${PYTHON:-python3}
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export TMPDIR=${TMPDIR:-/dev/shm}
large=(--preset 8b) small=(small medium) over=large
if [[ -n ${DRY:-} ]]; then
  large=(--preset tiny --context 256 --rounds 3 --users 4 --seconds 1 --kv-gib 0.2) small=(tiny) over=tiny
fi
begin=$SECONDS
# Beside the export and the start of the servers, before anything is timed.
for name in "${small[@]}"; do
  for dtype in ${DTYPES:-fp8 all}; do
    timeout 160 "$python" -W ignore -m perf.vllm_gpu --out "$out" --section parity --preset "$name" \
      $([[ $dtype == all ]] || echo --dtype "$dtype") --kv-gib 1 > "$out/parity-$name-$dtype.log" 2>&1 &
  done
done
# They wait for their turn, which comes last.
for mode in "" --in-process; do
  timeout "$limit" "$python" -W ignore -m perf.vllm_gpu --out "$out" --section overhead --preset "$over" \
    --kv-gib 2 $mode --start-when "$out/.go" > "$out/overhead$mode.log" 2>&1 &
done
timeout "$((limit - 20))" "$python" -W ignore -m perf.vllm_large --out "$out" "${large[@]}" --stop-at "$((limit - 85))" \
  > "$out/large.log" 2>&1
touch "$out/.go"
wait
rm -f "$out/.go" "$out/.turn"
echo "$((SECONDS - begin)) s"
grep -h "^==\|^   " "$out"/parity-*.log "$out/large.log" "$out"/overhead*.log | grep -v " 0\.0.. ms " | cut -c1-160
