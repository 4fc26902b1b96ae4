"""Promise: launch/quickstart.sh and launch/test.sh write only into the checkout."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def variables(checkout: Path) -> dict[str, str]:
    """What ``keep_inside`` of a checkout sets, from an empty environment."""
    (checkout / "launch").mkdir(parents=True)
    shutil.copy(ROOT / "launch" / "install.sh", checkout / "launch")
    script = "source launch/install.sh; keep_inside; export -p"
    done = subprocess.run(
        ["env", "-i", "PATH=/usr/bin:/bin", "bash", "-euo", "pipefail", "-c", script],
        cwd=checkout, capture_output=True, text=True, check=True,
    )
    assigned = [line.removeprefix("declare -x ").partition("=") for line in done.stdout.splitlines()]
    return {name: value.strip('"') for name, _, value in assigned if name not in ("PWD", "OLDPWD", "SHLVL", "PATH")}


def test_caches_and_temporary_files_lie_in_the_checkout(tmp_path_factory: pytest.TempPathFactory) -> None:
    # Longer than sockets in it may be: then the temporary folder stays where it was.
    deep = tmp_path_factory.mktemp("deep") / ("x" * 60)
    found = variables(deep)
    assert "TMPDIR" not in found
    assert {"XDG_CACHE_HOME", "HF_HOME", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"} <= set(found)
    for name, value in found.items():
        assert value.startswith(f"{deep}/.cache"), name


@pytest.mark.parametrize("name", ["quickstart.sh", "test.sh"])
def test_both_scripts_keep_inside_before_they_run_python(name: str) -> None:
    lines = (ROOT / "launch" / name).read_text().splitlines()
    assert lines.index("keep_inside") < next(number for number, line in enumerate(lines) if line.startswith("install_project"))


def test_the_temporary_folder_of_a_short_path_lies_in_it() -> None:
    script = "source launch/install.sh; install_root=$1; mkdir() { :; }; keep_inside; printf %s \"$TMPDIR\""
    done = subprocess.run(["bash", "-euc", script, "_", "/short"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "/short/.cache/tmp"
