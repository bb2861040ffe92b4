# Sourced by ./scripts/test, ./scripts/demo and .ci/run: `prepare EXTRA...` leaves in $QS_PYTHON an interpreter that has
# this package and all it needs. In this order: the environment $QSCOPE_VENV or .venv if it is complete; an environment
# that is active or on the PATH and already holds everything (it is used as it is, nothing is written into it and no
# index is asked); else .venv is made and filled by pip, which sees the caller's own PIP_* settings.

QS_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
QS_PYTHON=""

qs_say() { printf '%s: %s\n' "${QS_NAME:-qscope}" "$*" >&2; }
qs_fail() { qs_say "$*"; exit 1; }

qs_suitable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
qs_complete() { qs_suitable "$1" && "$1" -P "$QS_ROOT/scripts/environment.py" missing "$QS_ROOT/pyproject.toml" "${@:2}" >/dev/null 2>&1; }
qs_installed() {
  "$1" -P -c 'import importlib.util as u, os, sys
spec = u.find_spec("qscope_jax")
sys.exit(not spec or os.path.realpath(os.path.dirname(spec.origin or "")) != os.path.realpath(sys.argv[1]))' \
    "$QS_ROOT/qscope_jax" >/dev/null 2>&1
}

# An environment that holds the packages but not this checkout: a folder of two links goes before its own packages.
# (The repository's root itself must stay off the path: its folder kernels/ bears the name of another package.)
qs_borrow() {
  QS_PYTHON="$1"
  qs_installed "$1" && return
  local links="$QS_ROOT/.venv-links"
  mkdir -p "$links"
  ln -sfn ../qscope_jax "$links/qscope_jax"
  ln -sfn ../kernels/qscope_kernels "$links/qscope_kernels"
  export PYTHONPATH="$links${PYTHONPATH:+:$PYTHONPATH}"
}

qs_make_venv() {
  local venv="$1" python why="" found=""
  for python in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14 python}; do
    command -v "$python" >/dev/null 2>&1 || continue
    if ! qs_suitable "$python"; then
      why="$why
  $python is $({ "$python" --version 2>&1 || true; } | head -n 1)"
    elif ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
      why="$why
  $python has no module venv or ensurepip (on Debian and Ubuntu: apt install python3-venv)"
    else
      found="$python" && break
    fi
  done
  [ -n "$found" ] || qs_fail "needs Python 3.11 or newer with its module venv, and found none on the PATH.$why
Install one, or name it: PYTHON=/path/to/python3.12 ./scripts/${QS_NAME##*/}"
  qs_say "making $venv with $("$found" --version) ($(command -v "$found"))"
  "$found" -m venv "$venv" >&2 || qs_fail "$found could not make $venv; remove that folder and try again."
}

qs_install() {
  local venv="$1" extras told
  shift
  extras="$(IFS=,; printf '%s' "$*")"
  if ! told="$("$venv/bin/python" -P "$QS_ROOT/scripts/environment.py" reach 2>&1)"; then
    qs_fail "no environment here holds the packages, and pip finds no packages to install.
  Online, run again:    ./scripts/${QS_NAME##*/}
  From a folder:        PIP_NO_INDEX=1 PIP_FIND_LINKS=/folder/of/wheels ./scripts/${QS_NAME##*/}
                        (filled where there is a network: pip download -d /folder/of/wheels setuptools '.${extras:+[$extras]}')
  An environment that has them: activate it, or set QSCOPE_VENV to its folder, and run again.
pip said: $told"
  fi
  qs_say "installing into $venv (once; some minutes)"
  "$venv/bin/python" -m pip install --disable-pip-version-check --quiet --editable "$QS_ROOT${extras:+[$extras]}" >&2 ||
    qs_fail "pip could not install the packages (see above). Mend that and run again; what is there is kept."
}

prepare() {
  local venv="${QSCOPE_VENV:-$QS_ROOT/.venv}" python
  if [ -x "$venv/bin/python" ] && qs_complete "$venv/bin/python" "$@"; then
    qs_borrow "$venv/bin/python"
  else
    if [ -z "${QSCOPE_VENV:-}" ]; then
      for python in ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} ${CONDA_PREFIX:+"$CONDA_PREFIX/bin/python"} python3 python; do
        command -v "$python" >/dev/null 2>&1 && qs_complete "$python" "$@" && qs_borrow "$(command -v "$python")" && break
      done
    fi
    if [ -z "$QS_PYTHON" ]; then
      [ -x "$venv/bin/python" ] && qs_suitable "$venv/bin/python" || qs_make_venv "$venv"
      qs_install "$venv" "$@"
      QS_PYTHON="$venv/bin/python"
    fi
  fi
  qs_say "$("$QS_PYTHON" --version) at $QS_PYTHON"
}
