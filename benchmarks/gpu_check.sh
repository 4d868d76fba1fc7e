#!/usr/bin/env bash
# Everything that a GPU makes possible, in one command under 10 minutes: build, tests, memcheck, benchmark.
# All output goes to $OUT; each part runs even if an earlier one failed; the exit status says the sum.
set -uo pipefail

python=${PYTHON:-python3}
out=${OUT:-build/gpu-check}
mkdir -p "$out"
: >"$out/log.txt"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

if [ "$("$python" -c 'import torch; print(torch.cuda.is_available())')" != True ]; then
  echo "gpu-check: $python finds no GPU through torch, so there is nothing to check."
  exit 2
fi

failed=()
part() { # part NAME SECONDS COMMAND...
  local name=$1 seconds=$2
  shift 2
  echo "== $name" | tee -a "$out/log.txt"
  if timeout -k 5 "$seconds" "$@" 2>&1 | tee -a "$out/log.txt" | tail -n 40; then
    echo "== $name: passed"
  else
    echo "== $name: FAILED (exit status ${PIPESTATUS[0]})"
    failed+=("$name")
  fi
}

# The seconds add up to less than ten minutes.
DROPPATH_EXT_CUDA=1 part build 110 make build PYTHON="$python"
part info 15 "$python" -m droppath_ext.info
part tests 170 "$python" -m pytest -q -k "cuda or compile"
# Without the caching allocator, so that reads and writes beyond a tensor leave its allocation.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 part memcheck 70 compute-sanitizer --tool memcheck --error-exitcode 1 \
  "$python" -m pytest -q -m memcheck -k cuda
part ops 105 "$python" benchmarks/run.py ops --device cuda --quick --p 0.1,0.4 --json "$out/ops.json"
part overhead 25 "$python" benchmarks/run.py overhead --device cuda --quick --json "$out/overhead.json"
part model 40 "$python" benchmarks/run.py model --device cuda --quick --json "$out/model.json"
part skip 60 "$python" benchmarks/run.py skip --device cuda --quick --p 0.2,0.4 --json "$out/skip.json"

if ((${#failed[@]})); then
  echo "gpu-check: failed: ${failed[*]}; the log is in $out"
  exit 1
fi
echo "gpu-check: everything passed; the log and the results are in $out"
