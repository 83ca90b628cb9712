#!/usr/bin/env bash
# Makes a virtual environment with this project and one of its extras installed: environment.sh VENV EXTRA
# EXTRA "runtime" is no extra of pyproject.toml, which could only add to what the compiler needs: it installs what hawq_tvm.runtime needs,
# and of TVM the runtime libraries alone (deploy/README.md).
# The Makefile, CI and the container images all go through here.
set -euo pipefail
venv=$1 extra=$2

# TVM links the library it generates with a C++ compiler.
if [ "$extra" != runtime ] && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -y -qq g++ >/dev/null
    else
        echo "error: no C++ compiler found (g++ or clang++); install one, for example: sudo apt-get install g++" >&2
        exit 3
    fi
fi

# What some tests need and are skipped without: another architecture's compiler and emulator, CMake, a memory checker, minisign.
if [ "$extra" = test ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    wanted=
    for pair in aarch64-linux-gnu-gcc:gcc-aarch64-linux-gnu,libc6-dev-arm64-cross qemu-aarch64:qemu-user cmake:cmake make:make valgrind:valgrind minisign:minisign; do
        command -v "${pair%%:*}" >/dev/null || wanted="$wanted $(echo "${pair#*:}" | tr , ' ')"
    done
    if [ -n "$wanted" ]; then
        # shellcheck disable=SC2086  # a list of packages
        { apt-get update -qq && apt-get install -y -qq $wanted >/dev/null; } || echo "warning: not installed:$wanted; the tests that need them are skipped" >&2
    fi
fi

find_python() {
    local candidate
    for candidate in "${PYTHON3:-}" python3.11 python3.12 python3.10 python3 python "$HOME"/.pyenv/versions/3.1[012].*/bin/python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.10, 3.11 or 3.12 is needed, and none was found; set PYTHON3=/path/to/python3" >&2
    exit 3
}

if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    echo "making $venv with $("$python" --version)"
    if ! "$python" -m venv "$venv" 2>/dev/null; then
        rm -rf "$venv"
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            apt-get update -qq && apt-get install -y -qq "python$version-venv" >/dev/null
            "$python" -m venv "$venv"
        else
            echo "error: this Python cannot make virtual environments; try: sudo apt-get install python$version-venv" >&2
            exit 3
        fi
    fi
fi

# The version that pyproject.toml pins, as pip takes it.
pinned() { grep -om1 "\"$1==[^\"]*" pyproject.toml | tr -d '"'; }

# Of apache-tvm's wheel only the runtime's libraries are kept; pip does not know them.
install_runtime() {
    local wheel
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$(pinned numpy)" "$(pinned apache-tvm-ffi)" "$(pinned fastjsonschema)" "typing-extensions>=4.13" .
    "$venv/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" "$(pinned apache-tvm)"
    wheel=$(echo "$work"/apache_tvm-*.whl)
    "$venv/bin/python" - "$wheel" <<'PYTHON'
import sys, sysconfig, zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    names = [n for n in wheel.namelist() if n.startswith("tvm/lib/libtvm_runtime") or n in ("tvm/_version.py", "tvm/LICENSE", "tvm/NOTICE")]
    wheel.extractall(sysconfig.get_path("platlib"), names)
PYTHON
    rm -f "$venv/bin/hawq-tvm"  # the command line needs the compiler
}

if [ "$extra" = runtime ]; then
    echo "installing hawq_tvm.runtime into $venv"
    install_runtime
    touch "$venv/$extra.stamp"
    exit 0
fi

echo "installing hawq-tvm[$extra] into $venv (several minutes the first time)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extra]"
touch "$venv/$extra.stamp"
