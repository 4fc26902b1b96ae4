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
        self.total, self.on, self._spoken = total, on, 0.0
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
            print(f"step {step}/{self.total}  {figures}  {rates}", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
