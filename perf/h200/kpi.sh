#!/usr/bin/env bash
# The key figures of a preset behind a real tritonserver on a GPU machine, and a crowd of callers at once, in one call.
#
#   bash perf/h200/kpi.sh OUT [SECONDS]
#
# Expects a Python with vLLM, PyTriton's tritonserver and the plugin's entry point, perf_analyzer on PATH, and room for
# the preset, twice, in $WORK (/dev/shm/mtgr-kpi). OUT gets kpi.json and crowd.json as soon as each is done, and the logs; SECONDS
# (500) is the time that the call may take. DRY=1 runs all of it on a CPU with a tiny network and short times.
#
# The key figures are of the compiled engine and of auto beside it, with contexts of up to 2,101 tokens, so that the GPU
# is what limits; the crowd's are of vllm too. Every process that extracts features has a cache that holds all users.
# Three in ten requests are of who was here a moment ago, as one who turns pages of a feed; 2% are of users whom nobody
# knows, which are misses always. The crowd is served under a policy of its own: the usual one lets 256 requests run and
# 1,024 wait, and refuses once waiting takes a second, which 2,000 callers exceed.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd) seconds=${2:-500} python=${PYTHON:-python3}
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
work=${WORK:-/dev/shm/mtgr-kpi} callers=${CALLERS:-2000}
common=(--preset "${PRESET:-large}" --compiled "${COMPILED:-bf16}" --users "${USERS:-2000}" --history "${HISTORY:-2000}"
  --candidates "${CANDIDATES:-256}" --kv-gib "${KV_GIB:-64}" --vllm in_process=true --door-instances "${FEATURES:-2}"
  --router-instances "${ROUTERS:-4}" --feature-cache-mib 512)
sweep=(--concurrency 1,32,128,256 --rate-shares "" --repeats 2 --seconds 3 --kpi-warm-seconds 20 --kpi-seconds 30) crowd=(--seconds 12)
if [[ -n ${DRY:-} ]]; then
  callers=${CALLERS:-100}
  common=(--preset tiny --compiled fp32 --users 100 --history 64 --candidates 32 --vllm in_process=true --router-instances 2
    --feature-cache-mib 64)
  sweep=(--concurrency 1,4 --rate-shares 0.8 --repeats 1 --seconds 1 --warm-seconds 0.5 --kpi-seconds 4) crowd=(--seconds 2)
fi
begin=$SECONDS status=0
cat > "$out/crowd-policy.yaml" <<POLICY
extends: prod
deadline_seconds: 20
admission: { max_queue: 4096, safety: 1.0, max_wait: 15 }
POLICY
run() {
  local name=$1
  shift
  timeout "$((seconds - SECONDS + begin))" "$python" -W ignore -m perf.run "${common[@]}" --name "$name" \
    --out "$out" --server-log "$out/$name-server.log" --repeat-share 0.3 "$@" > "$out/$name.log" 2>&1 || status=1
  echo "== $((SECONDS - begin)) s: $name"
  tail -n 40 "$out/$name.log" | cut -c1-200
}
run kpi --work "$work/kpi" --strategy baseline --strategy auto "${sweep[@]}"
run crowd --work "$work/crowd" --policy "$out/crowd-policy.yaml" --strategy baseline --strategy vllm --strategy auto \
  --concurrency "$callers" --rate-shares "" --repeats 1 --warm-seconds 3 --kpi-seconds 0 "${crowd[@]}"
if [[ -f $out/kpi.json ]]; then
  "$python" -m perf.report "$out/kpi.json" --out "$out/report" || status=1
fi
tail -c 40000 "$out"/*-server.log > "$out/server-tails.txt"
exit "$status"
