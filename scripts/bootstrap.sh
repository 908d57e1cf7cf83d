#!/bin/sh
# Checks the tools that a build needs and creates the virtual environment: bootstrap.sh VENV PYTHON
set -eu
venv=$1
python=$2

fail() {
    echo "modelbatch: $1" >&2
    exit 1
}

command -v "$python" >/dev/null 2>&1 ||
    fail "no '$python' found; install Python 3.10 or newer, or name one: PYTHON=python3.12 make ..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" --version 2>&1) is too old; use 3.10 or newer: PYTHON=python3.12 make ..."
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "'$python' cannot create virtual environments; install them: apt install python3-venv"
headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -e "$headers/Python.h" ] ||
    fail "$headers/Python.h is missing; install Python's headers: apt install python3-dev"

first_compiler() {
    for name in "$@"; do
        if [ -n "$name" ] && command -v "${name%% *}" >/dev/null 2>&1; then return 0; fi
    done
    return 1
}
first_compiler "${CC:-gcc}" cc clang || fail "no C compiler found; install one: apt install gcc"
first_compiler "${CXX:-g++}" c++ clang++ || fail "no C++ compiler found; install one: apt install g++"

if [ ! -x "$venv/bin/python" ]; then
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    if [ "$free" -lt 8 ]; then
        echo "modelbatch: only $free GiB are free here; torch with CUDA and the rest take about 7" >&2
    fi
    echo "modelbatch: creating $venv with $("$python" --version 2>&1)"
    "$python" -m venv "$venv"
fi
