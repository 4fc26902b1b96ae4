"""What a layout computed against the reference, as numbers to hold against a tolerance.

float32: a layout only changes the order of sums of some 10^3 terms of like size, so results differ by a few units of the last
place (6e-8), magnified by cancellation in a gradient; 1e-5 of a tensor's largest element is far above that, and far below any
wrong count, missing replica or doubled gradient (10^-1 and up).

bfloat16: a number has 8 bits, so each state and each gradient of a state is off by up to 2^-9 of itself, and a walk down and
up through L blocks rounds some 10 L times: by random signs 2^-9 sqrt(10 L), 1% to 2% of a typical element. Without tensor
ranks most of these errors are the reference's own, and cells differ from it by 2^-8 of a gradient's largest element; tensor
ranks round their shares of each sum before they add them, which is an error of its own: 2^-5. The tolerances are about twice
what was seen, in powers of two. The reference must round where the layout does: behind a ReLU a state that changes its sign
switches a whole path on or off, and the `up` matrix of a notebook layer was 0.28 of its largest element off the float64
gradient with one kernel of attention, 0.33 with another, and as much apart. Tensor ranks cannot round as one process does, so
their notebook heads' gradients are held to 2^-1 of the largest element only (and to 1e-5 in float32, where the same cells
agree to 2e-6). A norm averages over all elements, so it is 2^-8 right until weights differ, there too. A conditional accuracy
may rest on thirty targets, of which a near tie moves one: 2^-4.
``test_faults`` breaks the product in ways that still train, and shows that these tolerances notice.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tests.distributed.layouts import configuration
from tests.distributed.tasks.oracle import reference


@dataclass(frozen=True)
class Tolerance:
    """`loss`, `norm` (of the first step), `later_norm`: relative; `gradient`, `weight`: of the largest element; `master`:
    of the largest change that training made to it; `accuracy`: absolute."""

    loss: float
    norm: float
    later_norm: float
    gradient: float
    weight: float
    master: float
    accuracy: float


TOLERANCES = {
    "float32": Tolerance(loss=1e-5, norm=1e-5, later_norm=1e-5, gradient=1e-5, weight=1e-5, master=1e-3, accuracy=1e-9),
    "bfloat16": Tolerance(
        loss=2**-8, norm=2**-8, later_norm=2**-7, gradient=2**-4, weight=2**-7, master=2**-3, accuracy=2**-4
    ),
}

BEHIND_RELU = replace(TOLERANCES["bfloat16"], gradient=2**-1, master=2**-2)

_KNOWN: dict[str, Any] = {}


def tolerance_of(layout: str | dict[str, Any]) -> Tolerance:
    """What a layout's results may differ by."""
    config = configuration(layout)
    if config.train.dtype == "bfloat16" and config.mtp.kind == "notebook" and config.parallel.tensor > 1:
        return BEHIND_RELU
    return TOLERANCES[config.train.dtype]


def expected(layout: str | dict[str, Any]) -> Any:
    """The reference of a layout, computed once for all that train the same model."""
    config = configuration(layout)
    key = repr((config.seed, config.model, config.mtp, config.optim, config.train.dtype))
    if key not in _KNOWN:
        _KNOWN[key] = reference(layout)
    return _KNOWN[key]


def differences(ranks: list[Any], want: Any) -> dict[str, dict[str, float]]:
    """Field of ``Tolerance`` -> what was compared -> the worst over all ranks."""
    found: dict[str, dict[str, float]] = {field.name: {} for field in fields(Tolerance)}

    def note(kind: str, name: str, value: float) -> None:
        # A comparison with nan is false: it counts as infinitely wrong.
        found[kind][name] = max(found[kind].get(name, 0.0), value if value == value else float("inf"))

    for result in ranks:
        for i, (got, right) in enumerate(zip(result["losses"], want["losses"], strict=True)):
            note("loss", f"step {i}", relative(got, right))
        for i, (got, right) in enumerate(zip(result["norms"], want["norms"], strict=True)):
            note("later_norm" if i else "norm", f"step {i}", relative(got, right))
        for name, got_means, right_means in [
            *((f"step {i}", *pair) for i, pair in enumerate(zip(result["means"], want["means"], strict=True))),
            ("held out", result["held_out"], want["held_out"]),
        ]:
            for kind in ("loss", "features", "adversary"):
                for k, (got, right) in enumerate(zip(got_means[kind], right_means[kind], strict=True)):
                    note("loss", f"{name}, {kind}, depth {k}", relative(got, right))
            for kind in ("accuracy", "conditional"):
                for k, (got, right) in enumerate(zip(got_means[kind], right_means[kind], strict=True)):
                    note("accuracy", f"{name}, {kind}, depth {k}", abs(got - right))
        for kind, wholes in (("gradient", want["gradients"]), ("weight", want["weights"])):
            for name, (_, start, value) in result[f"{kind}s"].items():
                # A weight that began as zeros is nothing but its change.
                change = kind == "weight" and not want["initial"][name].any()
                error = of_largest(value.float() - _slice(wholes[name], start, value.shape), wholes[name])
                note("master" if change else kind, name, error)
        for name, start, shape, begin, value in result["masters"]:
            whole = want["weights"][name]
            right = _slice(whole, start, shape).flatten()[begin : begin + len(value)]
            note("master", name, of_largest(value - right, whole - want["initial"][name]))
    return found


def beyond(ranks: list[Any], layout: str | dict[str, Any], *kinds: str) -> dict[str, float]:
    """What differs from the reference by more than the tolerance: fields of ``Tolerance``, all unless named."""
    tolerance = tolerance_of(layout)
    found = differences(ranks, expected(layout))
    assert all(found.values()), "something was not compared"
    return {
        f"{kind}: {name}": value
        for kind in kinds or found
        for name, value in found[kind].items()
        if value > getattr(tolerance, kind)
    }


def covered(ranks: list[Any], wholes: dict[str, Tensor], key: str) -> bool:
    """Whether every element of every tensor is on some rank."""
    seen = {name: torch.zeros(whole.shape, dtype=torch.bool) for name, whole in wholes.items()}
    for result in ranks:
        for name, (shape, start, value) in result[key].items():
            assert shape == tuple(seen[name].shape)
            _slice(seen[name], start, value.shape)[:] = True
    return all(part.all() for part in seen.values())


def relative(got: float, right: float) -> float:
    return abs(got - right) / abs(right) if right else abs(got)


def of_largest(difference: Tensor, whole: Tensor) -> float:
    largest, scale = difference.abs().max().item(), whole.abs().max().item()
    return largest / scale if scale else float("inf") if largest else 0.0


def _slice(whole: Tensor, start: tuple[int, ...], shape: Any) -> Tensor:
    return whole[tuple(slice(begin, begin + size) for begin, size in zip(start, shape, strict=True))]
