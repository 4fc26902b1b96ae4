#!/usr/bin/env bash
# The main job on a fresh machine, from nothing to decoded text: install, shards, pipelined training with MTP, a stop and a resume, evaluation,
# speculative decoding, plots. No GPU, no account. Less than ten minutes on two idle cores, downloads apart; started again it goes on where it was.
#
#   bash launch/quickstart.sh            more settings on the command line go to the training run, for example train.steps=100
#
# Everything lands in this checkout: .venv, .cache, datasets/python_stdlib, runs/quickstart (MTP_DIST_RUN names another run folder). launch/install.sh has
# the settings of the install, MTP_DIST_TORCH_INDEX (where torch comes from) among them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case ${1:-} in -h | --help) sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; exit 0 ;; esac

dataset=datasets/python_stdlib
run=${MTP_DIST_RUN:-runs/quickstart}
began=$SECONDS

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

export PYTHONWARNINGS=ignore

say "1/6 install"
# shellcheck source=launch/install.sh
source launch/install.sh
keep_inside
install_project
free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
[ "$free" -ge 1 ] || fail "less than 1 GiB is free in $PWD; shards and checkpoints need it"

say "2/6 shards from Python's own standard library, and a byte-pair tokenizer trained on it"
"$VENV_PYTHON" data/build_shards.py source=python_stdlib out="$dataset" shard_mb=8

say "3/6 train: two processes, V placement, ZeRO-1, two MTP modules, bfloat16"
train=("$VENV_PYTHON" -m mtp_dist.train experiment=quickstart run_dir="$run" data.path="$dataset" "$@")
# How far the run is: "<state> <step> <total>".
progress() {
  "$VENV_PYTHON" - "$run" << 'P'
import json, sys
from pathlib import Path

run, step, state, total = Path(sys.argv[1]), 0, "new", 0
try:
    status = json.loads((run / "status.json").read_text())
    state, step, total = status["state"], status["step"], status["total"]
    step = max(step, json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])
except (OSError, ValueError, IndexError):
    pass
print(state, step, total)
P
}

child=
interrupted() { if [ -n "$child" ]; then kill -TERM "$child" 2> /dev/null || true; wait "$child" || true; fi; exit 130; }
trap interrupted INT TERM

read -r state step total < <(progress)
if [ "$state" = new ] || { [ "$state" != finished ] && [ $((2 * step)) -lt "$total" ]; }; then
  "${train[@]}" &
  child=$!
  while kill -0 "$child" 2> /dev/null; do
    read -r state step total < <(progress)
    if [ "$state" = running ] && [ "$total" -gt 0 ] && [ $((2 * step)) -ge "$total" ]; then
      say "half-way: the run is asked to stop (SIGTERM), as a preempted job would be; it saves a checkpoint"
      kill -TERM "$child" 2> /dev/null || true
      break
    fi
    sleep 1
  done
  # A stopped run is no error here; any other failure is.
  wait "$child" || true
  child=
  read -r state step total < <(progress)
  case $state in stopped | finished) ;; *) fail "training ended in state '$state' at step $step; the reason is above" ;; esac
  stopped_at=$step
  say "the same command again: it resumes at step $step by itself"
fi
"${train[@]}" &
child=$!
wait "$child" || fail "training failed; the reason is above"
child=

say "4/6 evaluate on held-out files, under the training layout"
"$VENV_PYTHON" -m mtp_dist.evaluate checkpoint="$run" parallel=v2 sequences=64 output="$run/evaluation.json"

say "5/6 decode: the MTP modules draft, the trunk verifies"
"$VENV_PYTHON" -m mtp_dist.generate checkpoint="$run" prompt_file=launch/prompts.txt decode=sampling decode.temperature=0.7 \
  decode.auto=true decode.max_new_tokens=64 decode.threads=1
say "      greedy, against plain decoding, on 24 pieces of held-out files"
"$VENV_PYTHON" -m benchmarks.held_out_prompts "$dataset" "$run/prompts.jsonl" --count 24 --length 48
"$VENV_PYTHON" -m mtp_dist.evaluate task=decode checkpoint="$run" file="$run/prompts.jsonl" decode.auto=true \
  decode.max_new_tokens=96 decode.threads=1 output="$run/decoding" > "$run/decoding.md"
echo "report: $run/decoding/report.md"

say "6/6 plots"
"$VENV_PYTHON" -m mtp_dist.report run_dir="$run"

say "done in $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s"
"$VENV_PYTHON" launch/quickstart_summary.py "$run" "$dataset" "${stopped_at:-}"
