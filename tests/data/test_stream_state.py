"""A state that no stream has been in is named by its field; every state that one has been in resumes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from mtp_dist.data.dataset import Dataset
from mtp_dist.data.stream import StateError
from tests.data.test_stream import stream
from tests.hostile import no_hang

State = dict[str, Any]
MIX = {"documents": 0, "mixed": 3000}
HUGE = 10**18


def lane(**fields: Any) -> Callable[[State], Any]:
    return lambda state: state["lanes"]["1"].update(fields)


def order(**fields: Any) -> Callable[[State], Any]:
    return lambda state: state["order"].update(fields)


BOTH: dict[str, tuple[Callable[[State], Any], str]] = {
    "no lanes": (lambda state: state.pop("lanes"), "lanes is missing"),
    "no order": (lambda state: state.pop("order"), "order is missing"),
    "more": (lambda state: state.update(more=1), "more is not a field"),
    "lanes empty": (lambda state: state.update(lanes={}), "lanes lack 0, 1, 2, 3"),
    "lanes a list": (lambda state: state.update(lanes=[]), "lanes is a list, not an object"),
    "a lane less": (lambda state: state["lanes"].pop("2"), "lanes lack 2"),
    "a lane null": (lambda state: state["lanes"].update({"1": None}), r"lanes\.1 is null"),
    "a lane empty": (lambda state: state["lanes"].update({"1": {}}), r"lanes\.1\.epoch is missing"),
    "a lane more": (lambda state: state["lanes"].update({"4": state["lanes"]["1"]}), "'4', which is none of 4 lanes"),
    "a lane twice": (lambda state: state["lanes"].update({"01": state["lanes"]["1"]}), "'01', which is none"),
    "a lane named": (lambda state: state["lanes"].update({"²": state["lanes"]["1"]}), "'²', which is none"),
    "epoch huge": (lane(epoch=HUGE), rf"lanes\.1\.epoch is {HUGE}"),
    "epoch negative": (lane(epoch=-1), r"lanes\.1\.epoch is -1"),
    "epoch text": (lane(epoch="0"), r'lanes\.1\.epoch is "0", not an integer'),
    "epoch true": (lane(epoch=True), r"lanes\.1\.epoch is true, not an integer"),
    "order's lanes": (order(lanes=4.0), r"order\.lanes is 4\.0, not an integer"),
    "order's seed": (order(seed="1"), r'order\.seed is "1", not an integer'),
    "order's split": (order(split=3), r"order\.split is 3, not a"),
}
OF_DOCUMENTS = {
    "block": (lane(block=10**9), r"lanes\.1\.block is 1000000000, but there are \d+ blocks"),
    "sample": (lane(sample=8), r"lanes\.1\.sample is 8, but there are 8 documents"),
    "token": (lane(token=HUGE), rf"lanes\.1\.token is {HUGE}, but there are \d+ tokens"),
    "a place of the other kind": (lane(row=0), r"lanes\.1\.row is not a field"),
}
OF_ROWS = {
    "window": (lane(window=10**9), r"lanes\.1\.window is 1000000000, but there are \d+ windows"),
    "row": (lane(row=10**9), r"lanes\.1\.row is 1000000000, but there are \d+ rows"),
    "offset": (lane(offset=HUGE), rf"lanes\.1\.offset is {HUGE}, but there are \d+ tokens of a row"),
    "offset negative": (lane(offset=-1), r"lanes\.1\.offset is -1"),
    "no window": (lambda state: state["lanes"]["1"].pop("window"), r"lanes\.1\.window is missing"),
    "a place of the other kind": (lane(sample=0), r"lanes\.1\.sample is not a field"),
    "window_blocks": (order(window_blocks="2"), r'order\.window_blocks is "2", not an integer'),
}
CASES = [
    *(("documents", *case) for case in (BOTH | OF_DOCUMENTS).values()),
    *(("mixed", *case) for case in (BOTH | OF_ROWS).values()),
]


@pytest.mark.parametrize(("kind", "change", "said"), CASES)
def test_what_cannot_be_is_named(dataset: Dataset, kind: str, change: Callable[[State], Any], said: str) -> None:
    state = copy.deepcopy(stream(dataset, mix_tokens=MIX[kind]).next()[1])
    change(state)
    with no_hang(), pytest.raises(StateError, match=said) as refused:
        stream(dataset, mix_tokens=MIX[kind], state=state).next()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", MIX)
def test_every_state_of_three_epochs_resumes(dataset: Dataset, kind: str) -> None:
    reading = stream(dataset, mix_tokens=MIX[kind])
    seen = set()
    while min(place["epoch"] for place in reading.state["lanes"].values()) < 3:
        state = reading.next()[1]
        assert stream(dataset, mix_tokens=MIX[kind], state=state).state == state
        seen |= {place["epoch"] for place in state["lanes"].values()}
    assert {0, 1, 2, 3} <= seen
