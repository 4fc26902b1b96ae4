#!/usr/bin/env bash
# Makes the virtual environment and installs this package into it. Source it and call `install_project [extra]`, or run it:
#
#   bash launch/install.sh          what training needs
#   bash launch/install.sh serve    also what the HTTP server needs
#   bash launch/install.sh dev      also what tests and linters need, and the server
#
# A second call does nothing until pyproject.toml changes; an interrupted one is taken up again. Everything lands in the checkout.
# On return $VENV_PYTHON is the environment's interpreter. Settings, as environment variables:
#   MTP_DIST_PYTHON        interpreter to build the environment with (default: the first of python3.11, 3.12, 3.13, python3 that is
#                          3.11 or newer)
#   MTP_DIST_VENV          folder of the environment (default: .venv of this checkout)
#   MTP_DIST_TORCH_INDEX   package index (URL) to take torch from. A machine without a GPU needs only the CPU build, which is smaller
#                          by gigabytes: pytorch.org ("Get started", compute platform CPU) names its index. Unset, pip's configured
#                          indexes are asked: without a GPU first for the CPU build, then for torch's usual one.
#   MTP_DIST_INSTALL_GIB   free space to insist on before an install (default: 4 without a GPU, 12 with one)

install_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
install_log=$install_root/.cache/install.log

install_say() { printf 'install: %s\n' "$*"; }
install_fail() {
  printf 'error: %s\n' "$*" >&2
  return 1
}

has_gpu() { command -v nvidia-smi > /dev/null && nvidia-smi --list-gpus 2> /dev/null | grep -q '^GPU'; }

# Prints the interpreter to build with. A name that is found may still not run (version managers leave such shims).
find_python() {
  local name
  for name in ${MTP_DIST_PYTHON:-python3.11 python3.12 python3.13 python3}; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then
      command -v "$name"
      return
    fi
  done
  install_fail "no Python 3.11 or newer (tried: ${MTP_DIST_PYTHON:-python3.11 python3.12 python3.13 python3}); install one, or name it in MTP_DIST_PYTHON"
}

make_environment() {
  local venv=$1 python
  if "$venv/bin/python" -m pip --version > /dev/null 2>&1; then return; fi
  python=$(find_python) || return
  install_say "making $venv with $python ($("$python" -c 'import platform; print(platform.python_version())'))"
  # --clear: what lies there has no working pip, so it is the rest of an interrupted start.
  "$python" -m venv --clear "$venv" ||
    install_fail "$python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"
}

check_space() {
  local need free
  if has_gpu; then need=${MTP_DIST_INSTALL_GIB:-12}; else need=${MTP_DIST_INSTALL_GIB:-4}; fi
  free=$(df -Pk "$install_root" | awk 'NR == 2 {print int($4 / 1048576)}')
  [ "$free" -ge "$need" ] ||
    install_fail "$free GiB are free in $install_root, an install takes about $need; make space, or set MTP_DIST_INSTALL_GIB"
}

# pip with its cache and its temporary files inside the checkout. What it prints goes to a log; on a failure its last lines are shown.
install_pip() {
  mkdir -p "$install_root/.cache/tmp"
  printf '$ pip install %s\n' "$*" >> "$install_log"
  TMPDIR=$install_root/.cache/tmp PIP_CACHE_DIR=${PIP_CACHE_DIR:-$install_root/.cache/pip} \
    "$VENV_PYTHON" -m pip install --disable-pip-version-check --progress-bar off "$@" >> "$install_log" 2>&1
}
install_failed() {
  tail -n 15 "$install_log" >&2
  install_fail "$1; the lines above are the end of $install_log. Run it again to go on"
}

# What libraries would put into the home folder and the system's temporary one goes into .cache of the checkout. A variable of a tool
# that is set already stays. A unix socket's path holds 107 characters, so TMPDIR moves only where the checkout's own path is short.
keep_inside() {
  local cache=$install_root/.cache
  mkdir -p "$cache/tmp"
  export XDG_CACHE_HOME=$cache MPLCONFIGDIR=$cache/matplotlib HF_HOME=$cache/huggingface TRITON_HOME=$cache
  export TORCHINDUCTOR_CACHE_DIR=$cache/inductor TORCH_EXTENSIONS_DIR=$cache/torch_extensions
  export WANDB_CACHE_DIR=${WANDB_CACHE_DIR:-$cache/wandb} WANDB_DATA_DIR=${WANDB_DATA_DIR:-$cache/wandb-data}
  if [ "${#install_root}" -lt 60 ]; then export TMPDIR=$cache/tmp; fi
}

install_torch() {
  local pin
  pin=$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' "$install_root/pyproject.toml")
  if "$VENV_PYTHON" - "$pin" 2> /dev/null << 'P'; then return; fi
import sys
from importlib.metadata import version

sys.exit(version("torch").split("+")[0] != sys.argv[1].partition("==")[2])
P
  if [ -n "${MTP_DIST_TORCH_INDEX:-}" ]; then
    install_say "$pin from MTP_DIST_TORCH_INDEX"
    install_pip --index-url "$MTP_DIST_TORCH_INDEX" "$pin"
    return
  fi
  if ! has_gpu; then
    install_say "no GPU here: looking for the CPU build of $pin"
    if install_pip "$pin+cpu"; then return; fi
    install_say "pip's indexes do not offer $pin+cpu; taking the usual build, which may bring GPU libraries of several GB."
    install_say "To avoid that, stop here and set MTP_DIST_TORCH_INDEX (see the top of launch/install.sh)."
  fi
  install_say "$pin"
  install_pip "$pin"
}

# What an install depends on; anything else may change without another one.
install_fingerprint() { cat "$install_root/pyproject.toml" <(printf '%s' "${MTP_DIST_TORCH_INDEX:-}") | sha256sum | cut -d' ' -f1; }

install_project() {
  local extra=${1:-} venv stamp fingerprint
  venv=${MTP_DIST_VENV:-$install_root/.venv}
  VENV_PYTHON=$venv/bin/python
  stamp=$venv/.mtp_dist-installed
  fingerprint=$(install_fingerprint)
  # An environment with the extras serves those who need none.
  if [ -x "$VENV_PYTHON" ] && grep -qx "$fingerprint ${extra:-.*}" "$stamp" 2> /dev/null; then
    install_say "up to date ($venv)"
    return
  fi
  check_space || return
  make_environment "$venv" || return
  rm -f "$stamp"
  mkdir -p "$install_root/.cache"
  : > "$install_log"
  install_say "some minutes, the first time; pip's own words go to $install_log"
  install_torch || { install_failed "torch could not be installed"; return; }
  install_say "mtp_dist${extra:+ with extra '$extra'} and what it needs"
  install_pip --editable "$install_root${extra:+[$extra]}" || { install_failed "the install stopped"; return; }
  printf '%s %s\n' "$fingerprint" "${extra:-base}" > "$stamp"
  install_say "done ($venv)"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  install_project "$@"
fi
