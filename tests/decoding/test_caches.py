"""Caches change nothing: the trunk run in any pieces, and the modules after any accepts and rejects, equal one training pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mtp_dist.decoding import text as text_module
from mtp_dist.decoding.cache import HiddenStates, KeyValues, Span
from mtp_dist.decoding.drafter import Proposal
from mtp_dist.decoding.drafters import head_drafter
from mtp_dist.decoding.model import DecodingModel, TrunkPass
from mtp_dist.decoding.sampling import Chance, Sampling
from mtp_dist.decoding.text import Texts, shared
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.mtp.medusa import MedusaHeads
from mtp_dist.model.mtp.parallel import ParallelHeads
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
        cache.crop([7])
    expected = training_states(chunk, tokens)[0][:, 7:]
    torch.testing.assert_close(model.trunk(tokens[:, :10], caches)[1], expected, **EXACT)


class Followed:
    """Texts that grow by rounds, their trunk states always computed from scratch one by one, and drafters that follow them."""

    def __init__(self, chunk: Chunk, prompts: list[list[int]], sampling: Sampling, most: int) -> None:
        self.model, self.sampling, self.most = view(chunk), sampling, most
        self.texts = Texts(prompts, 64, self.model.device)
        self.drafter = self.new_drafter(self.texts)
        self.drafter.prefill(self.texts, self.states(self.texts, [0] * len(prompts), self.texts.known))

    def new_drafter(self, texts: Texts) -> Any:
        return head_drafter(self.model, len(texts), self.sampling, None, most=self.most)

    def states(self, texts: Texts, begin: list[int], end: list[int]) -> TrunkPass:
        """The trunk's states of positions begin[b] .. end[b] - 1; what follows them in a row is not a number."""
        rows = []
        for number, (first, behind) in enumerate(zip(begin, end, strict=True)):
            passed = self.model.trunk(texts.tokens[number : number + 1, :behind], self.model.caches(1))
            parts = [part[0, first:] for part in (*passed[:2], *passed.taps.values())]
            # A rejected draft's state follows in the longest row, too.
            rows.append([torch.cat((part, torch.full_like(part[:1], float("nan")))) for part in parts])
        before, after, *taps = (pad_sequence(p, batch_first=True, padding_value=float("nan")) for p in zip(*rows, strict=True))
        return TrunkPass(before, after, dict(zip(passed.taps, taps, strict=True)))

    def round(self, new: list[list[int]], count: int, seed: int) -> tuple[Proposal, Proposal]:
        """Append new[b] to each text; drafts of the drafter that has followed all along, and of new ones, each for one text."""
        shown = list(self.drafter.positions)
        self.texts.extend(new)
        newest = [known - 1 for known in self.texts.known]
        if newest != shown:
            self.drafter.observe(self.texts, self.states(self.texts, shown, newest))
        self.drafter.chooser.source = Chance([torch.Generator().manual_seed(seed + row) for row in range(len(new))])
        followed, rebuilt = self.drafter.propose(self.texts, count), []
        for row in range(len(new)):
            text = self.texts.rows[row]
            alone = Texts([text[:1]], 64, self.model.device)
            fresh = self.new_drafter(alone)
            fresh.prefill(alone, self.states(alone, [0], [1]))
            alone.extend([text[1:]])
            if len(text) > 2:
                fresh.observe(alone, self.states(alone, [1], [len(text) - 1]))
            fresh.chooser.source = torch.Generator().manual_seed(seed + row)
            rebuilt.append(fresh.propose(alone, count))
        q = [part.probabilities for part in rebuilt if part.probabilities is not None]
        return followed, Proposal(torch.cat([part.tokens for part in rebuilt]), torch.cat(q) if q else None)


rows = st.lists(st.integers(1, 6), min_size=1, max_size=3)  # prompts of so many tokens
scripts = st.lists(
    st.tuples(
        st.integers(1, 6),  # drafts asked for
        st.lists(st.integers(0, 6), min_size=3, max_size=3),  # drafts of the round before that each row accepts
        st.lists(st.integers(0, VOCABULARY - 1), min_size=3, max_size=3),  # the trunk's own token after them
        st.booleans(),  # whether the last of several rows then leaves the batch
    ),
    min_size=1,
    max_size=5,
)


def check_rounds(chunk: Chunk, prompts: list[int], script: list, sampling: Sampling) -> None:
    """After every round, every row's drafts equal those from caches rebuilt for it alone, and q is the training pass's own
    prediction."""
    # Heads side by side draft D tokens at most.
    most = chunk.depth if isinstance(chunk.mtp, ParallelHeads | MedusaHeads) else 6
    followed = Followed(chunk, [text(length, seed=length)[0].tolist() for length in prompts], sampling, most=most)
    drafts: list[list[int]] = [[] for _ in prompts]
    for number, (count, accepted, token, leaves) in enumerate(script):
        new = [[*drafts[row][: accepted[row]], token[row]] for row in range(len(drafts))]
        ours, rebuilt = followed.round(new, min(count, most), seed=10 * number)
        assert ours.tokens.tolist() == rebuilt.tokens.tolist()
        drafts = ours.tokens.tolist()
        if ours.probabilities is not None:
            torch.testing.assert_close(ours.probabilities, rebuilt.probabilities, **EXACT)
        for row in range(len(drafts)):
            known = torch.tensor([followed.texts.rows[row]])
            q = None if ours.probabilities is None else ours.probabilities[row : row + 1]
            check_prediction(chunk, known, Proposal(ours.tokens[row : row + 1], q), sampling)
        if leaves and len(drafts) > 1:
            stay = list(range(1, len(drafts)))
            followed.texts.keep(stay)
            followed.drafter.keep(stay)
            drafts = drafts[1:]


def check_prediction(chunk: Chunk, known: Tensor, proposal: Proposal, sampling: Sampling) -> None:
    """Depth k's draft is what the training pass over the known tokens and the drafts predicts at the last position."""
    drafts = proposal.tokens[:, : chunk.depth]
    row = torch.cat((known, drafts, torch.zeros(1, chunk.depth - drafts.shape[1], dtype=torch.int64)), dim=1)
    _, states = training_states(chunk, row)
    assert chunk.mtp is not None
    matrices: list = [projection.weight for projection in chunk.mtp.projections()] or [None] * chunk.depth
    trunk: Any = SimpleNamespace(norm=chunk.norm)
    for k in range(drafts.shape[1]):
        logits = view(chunk).logits(chunk.mtp.ready(states[k][:, -1], trunk), matrices[k])
        if proposal.probabilities is None:
            assert logits.argmax(-1).tolist() == drafts[:, k].tolist()
        else:
            torch.testing.assert_close(proposal.probabilities[:, k], sampling.probabilities(logits), **EXACT)


MODELS = [random_model(depth, dtype=torch.float64, seed=depth, **variant) for depth in (1, 2, 3) for variant in VARIANTS]
KINDS: list[dict[str, Any]] = [
    {"blocks": 2},
    {"repeat": True},
    {"kind": "parallel"},
    {"kind": "parallel", "branch": "final", "blocks": 2},
    {"kind": "medusa"},
    {"kind": "medusa", "projection": "own", "blocks": 2},
    {"kind": "notebook", "h0": "pre_norm"},
    {"embedding": "own", "projection": "own"},
    {"repeat": True, "projection": "own", "tie": False},
    {"kind": "notebook", "embedding": "own", "projection": "own"},
    {"kind": "eagle"},
    {"kind": "eagle", "h0": "pre_norm", "blocks": 2},
    # A draft behind the end of a document was never trained; with documents the mask of such a step differs from training's.
    {"kind": "eagle3", "document_mask": False},
]
OTHERS = [random_model(depth, dtype=torch.float64, seed=depth, **variant) for depth in (1, 3) for variant in KINDS]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(MODELS), rows, scripts, st.sampled_from([Sampling(), Sampling(0.8, 9, 0.95)]))
@example(
    MODELS[8],
    [1],
    [(c, [a] * 3, [t] * 3, False) for c, a, t in ((3, 0, 1), (1, 3, 2), (1, 1, END), (6, 1, 4), (2, 6, 5), (3, 0, 6))],
    Sampling(),
)
@example(
    MODELS[8],
    [5, 1, 2],
    [
        (3, [0, 0, 0], [1, END, 2], False),
        (6, [3, 0, 1], [2, 2, END], False),
        (2, [6, 0, 3], [4, 4, 4], True),
        (4, [0, 2, 1], [5, 5, 5], False),
        (3, [4, 0, 0], [6, 6, 6], True),
        (3, [2, 0, 0], [7, 7, 7], False),
    ],
    Sampling(1.0),
)
@torch.no_grad()
def test_drafts_equal_those_from_rebuilt_caches(chunk: Chunk, prompts: list[int], script: list, sampling: Sampling) -> None:
    check_rounds(chunk, prompts, script, sampling)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.sampled_from(OTHERS), rows, scripts, st.sampled_from([Sampling(), Sampling(0.8, 9, 0.95)]))
@torch.no_grad()
def test_drafts_of_any_kind_equal_those_from_rebuilt_caches(
    chunk: Chunk, prompts: list[int], script: list, sampling: Sampling
) -> None:
    check_rounds(chunk, prompts, script, sampling)


@pytest.mark.parametrize("number", range(len(OTHERS)))
@torch.no_grad()
def test_every_kind_follows_a_ragged_batch(number: int) -> None:
    script = [(3, [0, 0, 0], [1, END, 2], False), (2, [3, 0, 1], [4, 4, 4], False), (3, [0, 2, 1], [5, 5, 5], True)]
    check_rounds(OTHERS[number], [5, 1], script, Sampling(1.0))


@torch.no_grad()
def test_stale_entries_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were entries kept that rejected drafts had made, the check above would fail."""
    accepts = ([0, 0, 0], [0, 3, 0], [1, 3, 0], [0, 0, 0])
    script = [(3, accepted, [token] * 3, False) for token, accepted in enumerate(accepts, start=1)]
    check_rounds(MODELS[8], [5, 2], script, Sampling(1.0))
    monkeypatch.setattr(text_module, "shared", lambda used, tokens, most: [10**6] * len(tokens))
    with pytest.raises(AssertionError):
        check_rounds(MODELS[8], [5, 2], script, Sampling(1.0))


@torch.no_grad()
def test_the_trunk_of_a_ragged_batch_equals_one_training_pass_a_row() -> None:
    """Rows of odd lengths, each rolled back and gone on with as it likes, also after another row has left."""
    chunk = random_model(1, dtype=torch.float64)
    model, whole = view(chunk), torch.cat([text(21, seed=seed) for seed in (5, 6, 7)])
    expected = torch.cat([training_states(chunk, whole[row : row + 1])[0] for row in range(3)])
    texts, caches, alive = Texts(whole[:, :19].tolist(), 24, model.device), model.caches(3), [0, 1, 2]
    wrong = Texts([[1, 2, 9]] * 3, 24, model.device).tokens
    for ends in ([7, 1, 4], [8, 4, 5], [11, 5, 5], [12, 9, 6]):
        begin = caches[0].lengths
        states = model.trunk(texts.tokens, caches, ends).after_norm
        for place, row in enumerate(alive):
            count = ends[row] - begin[place]
            torch.testing.assert_close(states[place, :count], expected[row, begin[place] : ends[row]], **EXACT)
        model.trunk(torch.cat((texts.tokens[:, : max(ends)], wrong), dim=1), caches, [end + 3 for end in ends])
        for cache in caches:
            cache.crop(ends)
    for part in (texts, *caches):
        part.keep([2, 0])
    states = model.trunk(texts.tokens, caches, [9, 15]).after_norm
    torch.testing.assert_close(states[0, :3], expected[2, 6:9], **EXACT)
    torch.testing.assert_close(states[1, :3], expected[0, 12:15], **EXACT)


def test_shared_tokens() -> None:
    a, b = torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.tensor([[1, 2, 3], [1, 0, 3]])
    assert shared(a, b, [3, 3]) == [3, 1]
    assert shared(a, b, [2, 0]) == [2, 0]


def test_a_cache_refuses_what_does_not_fit() -> None:
    cache = KeyValues(1, 2, 4, 8, dtype=torch.float32, device=torch.device("cpu"))
    cache.extend(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8))
    with pytest.raises(IndexError, match="5 positions"):
        cache.extend(torch.ones(1, 2, 2, 8), torch.ones(1, 2, 2, 8))


def test_hidden_states_refuse_what_is_not_there() -> None:
    states = HiddenStates(2, 8, 1, dtype=torch.float32, device=torch.device("cpu"))
    states.write(Span([0, 0], [3, 1], states.states.device), torch.arange(6.0).view(2, 3, 1))
    assert states.read(Span([1, 0], [3, 1], states.states.device)).tolist() == [[[1], [2]], [[3], [3]]]
    states.crop([2, 5])
    assert states.lengths == [2, 1]
    with pytest.raises(IndexError, match="not all there"):
        states.read(Span([1, 0], [3, 1], states.states.device))
    with pytest.raises(IndexError, match="do not follow"):
        states.write(Span([3, 1], [4, 2], states.states.device), torch.ones(2, 1, 1))
