#!/usr/bin/env bash
# Builds hawq-run against the wheels of a Python: build.sh PYTHON FOLDER [CMAKE_OPTION...]; the tests and the container images go through here.
set -euo pipefail
cmake -S "$(dirname "$0")" -B "$2" -DPython3_EXECUTABLE="$1" "${@:3}"
cmake --build "$2" --parallel 2
