#!/usr/bin/env bash
# Build the compiled modules with AddressSanitizer and UndefinedBehaviorSanitizer, and run the tests of the kernels on them.
#
#     tools/sanitize.sh [PYTHON [ISA [TESTS...]]]
#
# PYTHON: an interpreter with the packages of the extra `test`; by default .venv/bin/python. ISA: the instruction sets to
# build, such as x86_64_v3; by default all. TESTS: what pytest shall run; by default every test of compiled code.
# GCC on Linux. Leaks are not looked for: CPython itself leaves memory behind.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$python" -m pip install --quiet --no-deps --target "$folder/site" \
  --config-settings=cmake.define.GEMMLET_SANITIZE=address,undefined \
  --config-settings=cmake.define.GEMMLET_ISAS="${2:-all}" .

# An editable install of the package would come before PYTHONPATH.
cat > "$folder/site/sitecustomize.py" <<'PYTHON'
import sys

sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
PYTHON

# The interpreter is not built with ASan, so its runtime has to be there before anything else.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH="$folder/site" PYTHONMALLOC=malloc GEMMLET_TEST_BACKENDS=${GEMMLET_TEST_BACKENDS:-cpu}
"$python" -c '
import gemmlet, pathlib
from gemmlet.backends import cpu as cpu_backend
assert pathlib.Path(gemmlet.__file__).is_relative_to("'"$folder"'"), gemmlet.__file__
print("under ASan and UBSan:", *cpu_backend.available_isas())'
# Not captured, as what the sanitizers print before they end the process would be lost.
tests=("${@:3}")
if ((${#tests[@]} == 0)); then
  tests=(tests/test_{kernels,augment,random,dropout,regularisers,special_values,layouts,bad_input,threads,fast_path,fused,plans,fit_bits,broken_indices}.py)
fi
"$python" -m pytest -q --capture=no -p no:cacheprovider -p no:benchmark --dist=load "${tests[@]}"
