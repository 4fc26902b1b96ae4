#!/usr/bin/env bash
# Installs what tests need (launch/install.sh has the settings), then runs ruff, mypy and pytest.
#
#   bash launch/test.sh                        everything but the long tests
#   bash launch/test.sh --full                 the long tests too; writes tests/full-result.md
#   bash launch/test.sh tests/tracking -x      other arguments go to pytest
#
# Tests that need a real Slurm are skipped, with the reason, where it is not installed (Debian and Ubuntu: slurm-wlm and munge).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

full=0
arguments=()
for word in "$@"; do
  case $word in
    --full) full=1 ;;
    -h | --help)
      sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'
      exit 0
      ;;
    *) arguments+=("$word") ;;
  esac
done

# shellcheck source=launch/install.sh
source launch/install.sh
keep_inside
install_project dev

failed=()
echo "== ruff"
"$VENV_PYTHON" -m ruff check . || failed+=(ruff)
echo "== mypy"
"$VENV_PYTHON" -m mypy || failed+=(mypy)
echo "== pytest"
mkdir -p .cache
# Where TMPDIR had to stay; else pytest numbers its own folders there, and two runs at a time are kept apart.
places=()
if [ "${TMPDIR:-}" != "$PWD/.cache/tmp" ]; then places=(--basetemp=.cache/pytest); fi
selection=(-m "not full")
if [ "$full" = 1 ]; then selection=(); fi
"$VENV_PYTHON" -m pytest "${places[@]}" --junitxml=.cache/tests.xml "${selection[@]}" "${arguments[@]}" || failed+=(pytest)
if [ "$full" = 1 ]; then "$VENV_PYTHON" tests/full_result.py .cache/tests.xml tests/full-result.md; fi

if [ "${#failed[@]}" -gt 0 ]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
echo "all passed"
