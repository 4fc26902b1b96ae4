"""The last words of launch/quickstart.sh: what was done, what came out and what to do next, read from the files that the steps
wrote."""

import json
import sys
from pathlib import Path


def main(run: Path, dataset: Path, stopped_at: str) -> None:
    """Print the summary. `stopped_at`: the step at which this start stopped the run, empty if it did not."""
    splits = json.loads((dataset / "dataset.json").read_text())["splits"]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    evaluation = json.loads((run / "evaluation.json").read_text())
    decoding = json.loads((run / "decoding" / "report.json").read_text())["parts"][0]
    trained, held = splits["train"]["tokens"], splits["validation"]["tokens"]
    depths = evaluation["depths"]
    print("held out     " + "; ".join(f"{name(d['depth'])}: loss {d['loss']:.3f}, accuracy {d['accuracy']:.1%}" for d in depths))
    plain, speculative = decoding["plain"], decoding["speculative"]
    accepted = ", ".join(f"{share:.0%} at depth {k}" for k, share in enumerate(speculative["acceptance"], start=1) if share)
    rates = f"{speculative['tokens_per_second']:.0f} tokens/s against {plain['tokens_per_second']:.0f} plain"
    low, high = decoding["speedup_quartiles"]
    gain = f"x{decoding['measured_speedup']:.2f} as fast as plain (half of the prompts: x{low:.2f} to x{high:.2f})"
    print(f"decoding     {gain}: {rates}")
    print(f"             {speculative['tokens_per_forward']:.2f} tokens a forward; accepted drafts: {accepted}")
    print(f"             identical to plain greedy decoding: {decoding['identical']} of {decoding['prompts']} texts")
    print(f"data         {dataset}: {trained:,} training and {held:,} held-out tokens")
    print(f"run          {run}: {last['step']} steps, {last['data/tokens_seen']:,} tokens (settings: {run}/resolved.yaml)")
    if stopped_at:
        print(f"stop/resume  stopped by SIGTERM at step {stopped_at}, resumed from its checkpoint")
    newest = (run / "checkpoints" / "latest").read_text().strip()
    print(f"checkpoint   {run}/checkpoints/{newest} (safetensors and JSON)")
    print(f"metrics      {run}/metrics.jsonl; plots: {run}/report/loss.png and others; wandb (offline): {run}/wandb")
    print("\nnext")
    python = ".venv/bin/python"
    print(f"  {python} -m mtp_dist.generate checkpoint={run} interactive=true   # write with the model")
    print(f"  {python} -m mtp_dist.plan experiment=quickstart data.path={dataset}   # who holds what, memory, schedules")
    print(f"  {python} data/build_shards.py source=text \"input=['FOLDER']\" out=datasets/mine   # then train on your text")


def name(depth: int) -> str:
    """As people say it."""
    return f"depth {depth}" if depth else "main"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
