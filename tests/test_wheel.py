"""Promise: installed as a wheel, away from the checkout, the package finds conf/."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_wheel_carries_and_finds_conf(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True, timeout=300)
    (wheel,) = tmp_path.glob("mtp_dist-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = (
        "import sys; sys.path = [p for p in sys.path if p != sys.argv[1]]; sys.path.insert(0, sys.argv[2])\n"
        "import mtp_dist; assert mtp_dist.__file__.startswith(sys.argv[2]), mtp_dist.__file__\n"
        "from mtp_dist.config.compose import compose\n"
        "from mtp_dist.config.schema import TrainingRun\n"
        "print(compose('train', TrainingRun, ['experiment=quickstart', 'model=llama3_8b']).model.hidden)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program, str(ROOT), str(site)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["128"]  # the experiment's own width wins over the group's
