#!/usr/bin/env bash
# Run tests of the CUDA kernels on the CPU (tests/cuda_on_host), the kernels compiled with sanitizers.
#
#     tools/sanitize_cuda.sh PYTHON SANITIZERS [PYTEST'S ARGUMENTS...]
#
# PYTHON: an interpreter with gemmlet and the packages of the extras `test` and `cuda12`. SANITIZERS: `address,undefined`
# finds stray accesses of memory, and ends at the first one; `thread` finds a missing barrier, as a data race between
# threads of a block or between blocks, and lets the test fail. ARGUMENTS: which tests, as `tests/test_kernels.py -k
# softmax`; by default all that are of CUDA alone, for a quarter of an hour. GCC on Linux.
set -euo pipefail
if (($# < 2)); then
  sed -n '2,9s/^# \{0,1\}//p' "$0"
  exit 2
fi
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
tests=("${@:3}")
if ((${#tests[@]} == 0)); then
  tests=(tests/test_cuda{,_on_host,_matmul,_training}.py)
fi

# Not captured, as what the sanitizers print before they end the process would be lost.
export GEMMLET_TEST_BACKENDS=cuda PYTHONPATH=tests${PYTHONPATH:+:$PYTHONPATH}
exec "$python" - "$2" -n 0 -q --capture=no -p no:cacheprovider -p no:benchmark "${tests[@]}" <<'PYTHON'
import os
import sys

from cuda_on_host.device import sanitized_environment

environment = sanitized_environment(*sys.argv[1].split(","))
if environment is None:
    sys.exit(f"the compiler has no library for {sys.argv[1]}")
os.execve(sys.executable, [sys.executable, "-m", "pytest", *sys.argv[2:]], environment)
PYTHON
