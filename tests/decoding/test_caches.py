"""Caches change nothing: the trunk run in any pieces, and the modules after any accepts and rejects, equal one training pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtp_dist.decoding import drafter as drafters
from mtp_dist.decoding.cache import KeyValues, Window
from mtp_dist.decoding.drafter import DecodingState, Proposal, SequentialDrafter, shared_prefix
from mtp_dist.decoding.model import DecodingModel
from mtp_dist.decoding.sampling import Sampling
from mtp_dist.model.chunk import Chunk
from tests.decoding.models import VOCABULARY, random_model

END = 3
VARIANTS = [
    {},
    {"concat": "hidden_first", "h0": "pre_norm", "recycle": "pre_norm"},
    {"tie": False, "h0": "pre_norm"},
    {"document_mask": False, "recycle": "pre_norm"},
]
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@contextmanager
def recorded(module: torch.nn.Module) -> Iterator[list]:
    """What a module returns while the training forward runs."""
    results: list = []
    handle = module.register_forward_hook(lambda *call: results.append(call[-1]))
    try:
        yield results
    finally:
        handle.remove()


@torch.no_grad()
def training_states(chunk: Chunk, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Row [1, S+1+D] through ``Chunk.forward`` as in training -> the trunk's normed states and each depth's, all [1, S, d]."""
    ends = (tokens == END).long()
    assert chunk.norm is not None
    assert chunk.mtp is not None
    with recorded(chunk.norm) as normed, recorded(chunk.mtp) as states:
        chunk(tokens=tokens, documents=ends.cumsum(1) - ends, scale=torch.ones(1, 1 + chunk.depth))
    return normed[0], states[0]


def text(length: int, seed: int) -> Tensor:
    """[1, length] random tokens, now and then the end of a document."""
    return torch.randint(VOCABULARY // 2, (1, length), generator=torch.Generator().manual_seed(seed))


def view(chunk: Chunk) -> DecodingModel:
    return DecodingModel(chunk, 64, end=END)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pieces", [[17], [1] * 17, [5, 1, 1, 4, 6], [2, 15]])
@torch.no_grad()
def test_the_trunk_in_pieces_equals_one_training_pass(variant: dict, pieces: list[int]) -> None:
    chunk = random_model(1, dtype=torch.float64, **variant)
    tokens = text(17 + 2, seed=5)
    assert (tokens == END).any()
    model = view(chunk)
    caches = [model.cache(1) for _ in chunk.layers]
    parts, done = [], 0
    for size in pieces:
        done += size
        parts.append(model.trunk(tokens[:, :done], caches)[1])
    torch.testing.assert_close(torch.cat(parts, dim=1), training_states(chunk, tokens)[0], **EXACT)


@torch.no_grad()
def test_a_rolled_back_trunk_forgets_what_was_rejected() -> None:
    chunk = random_model(1, dtype=torch.float64)
    model, tokens = view(chunk), text(12, seed=6)
    caches = [model.cache(1) for _ in chunk.layers]
    model.trunk(torch.cat((tokens[:, :7], text(4, seed=7)), dim=1), caches)
    for cache in caches:
        cache.crop(7)
    expected = training_states(chunk, tokens)[0][:, 7:]
    torch.testing.assert_close(model.trunk(tokens[:, :10], caches)[1], expected, **EXACT)


class Text:
    """A text that grows by rounds, its trunk states always computed from scratch, and drafters that follow it."""

    def __init__(self, chunk: Chunk, prompt: Tensor, sampling: Sampling, most: int) -> None:
        self.model, self.sampling, self.most = view(chunk), sampling, most
        self.tokens, self.shown = prompt, 0
        self.drafter = self.new_drafter(seed=0)
        self.drafter.prefill(self.state(prompt, 0))
        self.shown = prompt.shape[1]

    def new_drafter(self, seed: int) -> SequentialDrafter:
        return SequentialDrafter(self.model, 1, self.sampling, torch.Generator().manual_seed(seed), most=self.most)

    def state(self, tokens: Tensor, shown: int, run: int | None = None) -> DecodingState:
        """``tokens`` with the trunk's states of positions shown .. run - 1 (default: all)."""
        run = tokens.shape[1] if run is None else run
        before, after = self.model.trunk(tokens[:, :run], [self.model.cache(1) for _ in self.model.chunk.layers])
        return DecodingState(tokens, before[:, shown:], after[:, shown:])

    def round(self, new: Tensor, count: int, seed: int) -> tuple[Proposal, Proposal]:
        """Append ``new`` [1, n]; drafts of the drafter that has followed all along, and of one that starts here."""
        self.tokens = torch.cat((self.tokens, new), dim=1)
        known = self.tokens.shape[1]
        self.drafter.generator = torch.Generator().manual_seed(seed)
        followed = self.drafter.propose(self.state(self.tokens, self.shown, known - 1), count)
        fresh = self.new_drafter(seed)
        fresh.prefill(self.state(self.tokens[:, :1], 0))
        rebuilt = fresh.propose(self.state(self.tokens, 1, known - 1), count)
        self.shown = known - 1
        return followed, rebuilt


rounds = st.lists(
    st.tuples(
        st.integers(1, 6),  # drafts asked for
        st.integers(0, 6),  # drafts accepted of the round before
        st.integers(0, VOCABULARY - 1),  # the trunk's own token after them
    ),
    min_size=1,
    max_size=5,
)


def check_rounds(chunk: Chunk, prompt: int, script: list[tuple[int, int, int]], sampling: Sampling) -> None:
    """After every round, drafts equal those from rebuilt caches, and q is the training pass's own prediction."""
    followed = Text(chunk, text(prompt, seed=prompt), sampling, most=6)
    drafts = torch.empty(1, 0, dtype=torch.int64)
    for number, (count, accepted, token) in enumerate(script):
        new = torch.cat((drafts[:, :accepted], torch.tensor([[token]])), dim=1)
        ours, rebuilt = followed.round(new, count, seed=number)
        assert ours.tokens.tolist() == rebuilt.tokens.tolist()
        drafts = ours.tokens
        check_prediction(chunk, followed.tokens, ours, sampling)
        if ours.probabilities is not None:
            torch.testing.assert_close(ours.probabilities, rebuilt.probabilities, **EXACT)


def check_prediction(chunk: Chunk, known: Tensor, proposal: Proposal, sampling: Sampling) -> None:
    """Depth k's draft is what the training pass over the known tokens and the drafts predicts at the last position."""
    drafts = proposal.tokens[:, : chunk.depth]
    row = torch.cat((known, drafts, torch.zeros(1, chunk.depth - drafts.shape[1], dtype=torch.int64)), dim=1)
    _, states = training_states(chunk, row)
    for k in range(drafts.shape[1]):
        logits = view(chunk).logits(states[k][:, -1])
        if proposal.probabilities is None:
            assert logits.argmax(-1).tolist() == drafts[:, k].tolist()
        else:
            torch.testing.assert_close(proposal.probabilities[:, k], sampling.probabilities(logits), **EXACT)


MODELS = [random_model(depth, dtype=torch.float64, seed=depth, **variant) for depth in (1, 2, 3) for variant in VARIANTS]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(MODELS), st.integers(1, 6), rounds, st.sampled_from([Sampling(), Sampling(0.8, 9, 0.95)]))
@example(MODELS[8], 1, [(3, 0, 1), (1, 3, 2), (1, 1, END), (6, 1, 4), (2, 6, 5), (3, 0, 6)], Sampling())
@torch.no_grad()
def test_drafts_equal_those_from_rebuilt_caches(chunk: Chunk, prompt: int, script: list, sampling: Sampling) -> None:
    check_rounds(chunk, prompt, script, sampling)


@torch.no_grad()
def test_stale_entries_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were entries kept that rejected drafts had made, the check above would fail."""
    monkeypatch.setattr(drafters, "shared_prefix", lambda used, tokens: 10**6)
    with pytest.raises(AssertionError):
        check_rounds(MODELS[8], 5, [(3, 0, 1), (3, 0, 2), (3, 1, 3), (3, 0, 4)], Sampling(1.0))


def test_shared_prefix() -> None:
    a = torch.tensor([[1, 2, 3], [1, 2, 3]])
    assert shared_prefix(a, a) == 3
    assert shared_prefix(a, torch.tensor([[1, 2, 3, 4], [1, 0, 3, 4]])) == 1
    assert shared_prefix(a[:, :0], a) == 0


def test_a_cache_refuses_what_does_not_fit() -> None:
    cache = KeyValues(1, 2, 4, 8, dtype=torch.float32, device=torch.device("cpu"))
    cache.extend(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8))
    with pytest.raises(IndexError, match="5 positions"):
        cache.extend(torch.ones(1, 2, 2, 8), torch.ones(1, 2, 2, 8))


def test_a_window_refuses_what_it_forgot() -> None:
    window = Window(1, 2, dtype=torch.float32, device=torch.device("cpu"))
    window.append(torch.arange(10.0).view(1, 5, 2))
    window.forget(2)
    window.crop(4)
    assert window.since(3).tolist() == [[[6, 7]]]
    assert window.end == 4
    with pytest.raises(IndexError, match="position 1 is forgotten"):
        window.since(1)
