#!/usr/bin/env bash
# Checks of one node before a job starts there; srun runs it once on each node. One line a node, or the reason to stop.
#
#   slurm/preflight.sh RUN_DIR PYTHON TOKEN GPUS
#
#   RUN_DIR   folder of the run; every node must see it and write to it
#   PYTHON    the interpreter of the job
#   TOKEN     text that the first node has put into RUN_DIR/.preflight: proof that all nodes see one folder
#   GPUS      GPUs that this node must have, 0 for none
#   MTP_DIST_MIN_FREE_GIB   free space asked for in RUN_DIR (environment, default 1)
set -uo pipefail

run_dir=$1 python=$2 token=$3 gpus=$4
node=${SLURMD_NODENAME:-$(hostname -s)}
min_free=${MTP_DIST_MIN_FREE_GIB:-1}

fail() { echo "preflight: $node: $*" >&2; exit 1; }

[ -d "$run_dir" ] || fail "$run_dir does not exist here; run_dir must lie on a file system that all nodes share"
[ "$(cat "$run_dir/.preflight" 2> /dev/null)" = "$token" ] || fail "$run_dir is another folder here than on the first node"
probe=$run_dir/.preflight-$node-$$
{ echo "$token" > "$probe" && rm "$probe"; } 2> /dev/null || fail "$run_dir cannot be written here"
free=$(df -Pk "$run_dir" | awk 'NR == 2 {print int($4 / 1048576)}')
[ "$free" -ge "$min_free" ] || fail "$free GiB are free in $run_dir; $min_free are needed (MTP_DIST_MIN_FREE_GIB)"
[ -x "$python" ] || fail "$python is missing here; the virtual environment must lie on a file system that all nodes share"
# Reads the installed versions without importing torch.
versions=$("$python" -c '
import platform, sys
from importlib.metadata import version
from mtp_dist.config import versions
from mtp_dist.config.command import guarded
status = guarded(versions.check)
print(f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in ("torch", "mtp_dist")), sep=", ")
sys.exit(status)
' 2>&1) || fail "$(printf '%s' "$versions" | head -n 3 | tr '\n' ' ')"
if [ "$gpus" -gt 0 ]; then
  seen=$(nvidia-smi --list-gpus 2> /dev/null | grep -c '^GPU')
  [ "$seen" -ge "$gpus" ] || fail "$seen GPU(s) are visible; launch.gpus_per_node=$gpus asks for more"
fi
echo "preflight: $node: ${versions##*$'\n'}, $(nproc) cores, $gpus GPU(s), $free GiB free in run_dir"
