#!/usr/bin/env bash
# The GPU path, measured in one command: bash benchmarks/gpu/run.sh OUT [part ...]
#
# Needs torch, transformers, sentence-transformers, accelerate, peft and datasets; makes random weights itself, so no
# network. Parts, in order of worth: families encode steps loss fsdp kills. Each has a time limit of its own, and writes what it has
# found after each measurement; one that fails or hangs does not stop the next. SECONDS_IN_ALL bounds the whole (480), DEVICE and TINY=1 run
# the same code small on a CPU: DEVICE=cpu TINY=1 bash benchmarks/gpu/run.sh OUT. ONLY=qwen2_vl measures one shape.
set -u
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?folder of the results}; shift
export PYTHONPATH="$here/../../src:$here/../../tests:$here${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
mkdir -p "$out"
end=$(( $(date +%s) + ${SECONDS_IN_ALL:-480} ))
declare -A limit=([families]=90 [encode]=180 [steps]=150 [loss]=45 [fsdp]=75 [kills]=75)  # seconds; more on a slow CPU
[ $# -gt 0 ] || set -- families encode steps loss fsdp kills
for part in "$@"; do
  left=$(( end - $(date +%s) ))
  if [ $left -lt 20 ]; then echo "$part: not run, no time is left"; continue; fi
  own=${limit[$part]:?no such part: families encode steps loss fsdp kills}
  [ -z "${TINY:-}" ] && [ "$own" -lt "$left" ] && left=$own
  echo "== $part (at most $left s)"
  timeout -k 5 "$left" "$python" "$here/$part.py" --out "$out" --device "${DEVICE:-cuda}" ${TINY:+--tiny} ${ONLY:+--only "$ONLY"} 2>"$out/$part.err" || echo "$part: ended with $?"
  tail -n 3 "$out/$part.err"
done
"$python" "$here/report.py" "$out"
