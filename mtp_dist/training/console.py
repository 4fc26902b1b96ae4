"""What a person sees of a run: a progress bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

from mtp_dist.tracking import names

QUIET_SECONDS = 10.0


class Console:
    """Rank 0's voice; `on` False is silent."""

    def __init__(self, total: int, start: int, *, on: bool) -> None:
        self.total, self.start, self.on, self._spoken = total, start, on, 0.0
        self._began = 0.0  # when the first step of this start had ended: it is slower than the others
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if on and sys.stderr.isatty() else None

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text)
        elif self.on:
            print(text, flush=True)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """After each step; `metrics` may be empty where it was not measured."""
        if not self.on:
            return
        self._began = self._began or time.monotonic()
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
        if names.LOSS_TOTAL not in metrics:
            return
        depths = [metrics[name] for k in range(1, 100) if (name := names.of_depth(names.LOSS_DEPTH, k)) in metrics]
        figures = f"loss {metrics.get(names.LOSS_TOTAL, float('nan')):.4f}  main {metrics.get(names.LOSS_MAIN, float('nan')):.4f}"
        figures += "".join(f"  depth{k} {loss:.4f}" for k, loss in enumerate(depths, start=1))
        speed = metrics.get(names.TOKENS_PER_SECOND, 0.0)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{figures}  {speed:,.0f} tok/s")
        elif time.monotonic() - self._spoken > QUIET_SECONDS or step == self.total:
            self._spoken = time.monotonic()
            norm = metrics.get(names.GRADIENT_NORM, float("nan"))
            rates = f"norm {norm:.3f}  lr {metrics[names.LEARNING_RATE]:.2e}  {speed:,.0f} tok/s"
            print(f"step {step}/{self.total}  {step / self.total:4.0%}{self._left(step)}  {figures}  {rates}", flush=True)

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Held-out rows, as a small table: a line for the main head and each depth."""
        rows = [["", "loss", "accuracy", "after right drafts"]]
        rows.append(["main", f"{metrics[names.VALIDATION_LOSS_MAIN]:.4f}", f"{metrics[names.VALIDATION_ACCURACY_MAIN]:.1%}", ""])
        depth = 1
        while (name := names.of_depth(names.VALIDATION_LOSS_DEPTH, depth)) in metrics:
            shares = (names.VALIDATION_ACCURACY_DEPTH, names.VALIDATION_ACCURACY_CONDITIONAL_DEPTH)
            rows.append([f"depth {depth}", f"{metrics[name]:.4f}", *(f"{metrics[names.of_depth(s, depth)]:.1%}" for s in shares)])
            depth += 1
        total = f"held-out loss {metrics[names.VALIDATION_LOSS_TOTAL]:.4f} in all"
        table = [f"  {row[0]:9}{row[1]:>8}{row[2]:>10}{row[3]:>20}".rstrip() for row in rows[: None if depth > 1 else 2]]
        self.say("\n".join([f"validation at step {step}: {total}", *table]))

    def _left(self, step: int) -> str:
        """How long the rest takes at the mean speed of this start, pauses for validation and checkpoints included."""
        done = step - self.start
        if done < 2:
            return ""
        seconds = round((time.monotonic() - self._began) / (done - 1) * (self.total - step))
        hours, minutes = divmod(seconds // 60, 60)
        return f"  ETA {hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"  ETA {minutes}:{seconds % 60:02d}"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
