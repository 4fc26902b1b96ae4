"""The last words of launch/quickstart.sh: what was done and where it is, in at most 20 lines, read from the files that the
steps wrote."""

import json
import sys
from pathlib import Path


def main(run: Path, dataset: Path, stopped_at: str) -> None:
    """Print the summary. `stopped_at`: the step at which this start stopped the run, empty if it did not."""
    splits = json.loads((dataset / "dataset.json").read_text())["splits"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = records[0], records[-1]
    evaluation = json.loads((run / "evaluation.json").read_text())
    generation = json.loads((run / "generation.json").read_text())
    trained, held = splits["train"]["tokens"], splits["validation"]["tokens"]
    print(f"data         {dataset}: {trained:,} training and {held:,} held-out tokens")
    print(f"run          {run}: {last['step']} steps, {last['data/tokens_seen']:,} tokens (settings: {run}/resolved.yaml)")
    print(f"loss         {first['loss/main']:.3f} at step {first['step']}, {last['loss/main']:.3f} at step {last['step']}")
    if stopped_at:
        print(f"stop/resume  stopped by SIGTERM at step {stopped_at}, resumed from its checkpoint")
    depths = evaluation["depths"]
    print("held out     " + "; ".join(f"{name(d['depth'])}: loss {d['loss']:.3f}, accuracy {d['accuracy']:.1%}" for d in depths))
    plain, speculative = (generation["total"][mode] for mode in ("plain", "speculative"))
    accepted = ", ".join(f"{share:.0%} at depth {k}" for k, share in enumerate(speculative["acceptance"], start=1))
    print(f"decoding     accepted drafts: {accepted}; {speculative['tokens_per_forward']:.2f} tokens a forward")
    rates = f"{speculative['tokens_per_second']:.0f} tokens/s against {plain['tokens_per_second']:.0f} plain"
    same = all(prompt["identical"] for prompt in generation["prompts"])
    print(f"             {rates}: x{generation['speedup']:.2f}; greedy texts {'identical' if same else 'DIFFER'}")
    newest = (run / "checkpoints" / "latest").read_text().strip()
    print(f"checkpoint   {run}/checkpoints/{newest} (safetensors and JSON)")
    print(f"metrics      {run}/metrics.jsonl; wandb (offline): {run}/wandb")
    print(f"plots        {run}/report/loss.png and others")
    print(f"go on        .venv/bin/python -m mtp_dist.generate checkpoint={run} prompt='def add(a, b):'")


def name(depth: int) -> str:
    """As people say it."""
    return f"depth {depth}" if depth else "main"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
