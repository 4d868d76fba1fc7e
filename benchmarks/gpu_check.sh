#!/usr/bin/env bash
# Everything that a GPU makes possible, in one command under 10 minutes: build, tests, memcheck, benchmark.
# All output goes to $OUT; each part runs even if an earlier one failed; the exit status says the sum.
set -uo pipefail

python=${PYTHON:-python3}
out=${OUT:-build/gpu-check}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu-check: torch sees no GPU here, so there is nothing to check."
  exit 2
fi

failed=()
part() { # part NAME SECONDS COMMAND...
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  if timeout "$seconds" "$@" 2>&1 | tee "$out/$name.log" | tail -n 40; then
    echo "== $name: passed"
  else
    echo "== $name: FAILED (exit status ${PIPESTATUS[0]})"
    failed+=("$name")
  fi
}

DROPPATH_EXT_CUDA=1 part build 180 "$python" setup.py build_ext --inplace
part info 60 "$python" -m droppath_ext.info
part tests 200 "$python" -m pytest -q -k "cuda or compile"
part memcheck 90 compute-sanitizer --tool memcheck --error-exitcode 1 "$python" -m pytest -q -m memcheck -k cuda
part ops 100 "$python" benchmarks/run.py ops --device cuda --quick --json "$out/ops.json" --plot "$out"
part overhead 30 "$python" benchmarks/run.py overhead --device cuda --json "$out/overhead.json"
part model 60 "$python" benchmarks/run.py model --device cuda --quick --json "$out/model.json"

if ((${#failed[@]})); then
  echo "gpu-check: failed: ${failed[*]}; the logs are in $out"
  exit 1
fi
echo "gpu-check: everything passed; the logs and results are in $out"
