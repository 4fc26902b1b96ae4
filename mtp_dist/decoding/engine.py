"""The decoding loop: draft, verify in one pass through the trunk, keep what is accepted and the trunk's own token after it.

Plain decoding is the same loop without drafts, so that a comparison of the two compares nothing else.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_dist.config.schema import DecodeConfig
from mtp_dist.decoding.drafter import DecodingState, Drafter, Proposal, SequentialDrafter
from mtp_dist.decoding.model import DecodingModel
from mtp_dist.decoding.sampling import Sampling
from mtp_dist.decoding.statistics import Statistics
from mtp_dist.decoding.verification import Verdict, verify_greedy, verify_sampled
from mtp_dist.model.chunk import Chunk


@dataclass(frozen=True)
class Generated:
    """tokens: the continuation, without the prompt; the last one is the end-of-document token if the text ended there."""

    tokens: list[int]
    statistics: Statistics
    ended: bool


@dataclass(frozen=True)
class Round:
    """What one forward of the loop gave: ``tokens`` are the accepted drafts and one more; ``drafted`` drafts were verified."""

    tokens: list[int]
    drafted: int


def draft_length(config: DecodeConfig, depth: int) -> int:
    """γ, drafts verified in one forward: 0 for plain decoding. depth: the model's D."""
    if config.mode == "plain":
        return 0
    return depth if config.draft is None else config.draft


@torch.inference_mode()
def generate(
    model: Chunk,
    prompt: list[int],
    config: DecodeConfig,
    *,
    end: int | None = None,
    vocabulary: int | None = None,
    generator: torch.Generator | None = None,
    progress: Callable[[int], object] | None = None,
) -> Generated:
    """Continue one prompt of one or more tokens by at most ``config.max_new_tokens``; ``config.mode`` is plain or speculative.

    ``end`` is the end-of-document token: it ends the text if ``config.stop_at_eos``, and separates documents for attention.
    ``vocabulary``: see ``DecodingModel``. ``generator``: for sampling; None takes torch's own. ``progress`` is called after each
    forward with the number of new tokens. For what is timed see ``Statistics``.
    """
    if not prompt:
        raise ValueError("the prompt has no token")
    most = draft_length(config, model.depth)
    decoder = DecodingModel(model, len(prompt) + config.max_new_tokens + most + 1, end=end, vocabulary=vocabulary)
    sampling = Sampling.of(config)
    drafter = SequentialDrafter(decoder, 1, sampling, generator, most=most) if most else None
    statistics = Statistics(prompt_tokens=len(prompt))
    stop = end if config.stop_at_eos else None
    tokens: list[int] = []
    started = time.perf_counter()
    for new in rounds(decoder, prompt, config.max_new_tokens, most, sampling, drafter, generator):
        kept = until(new.tokens, stop)
        if tokens:
            accepted = min(len(new.tokens) - 1, len(kept))
            # Drafts behind the end of the text were never part of it.
            drafted = accepted if len(kept) < len(new.tokens) else new.drafted
            statistics.count(drafted, accepted, len(kept))
        else:
            statistics.tokens = 1
            statistics.prefill_seconds, started = time.perf_counter() - started, time.perf_counter()
        tokens += kept
        if progress is not None:
            progress(len(kept))
        if stop is not None and tokens[-1] == stop:
            break
    statistics.seconds = time.perf_counter() - started
    return Generated(tokens, statistics, stop is not None and tokens[-1] == stop)


def rounds(
    model: DecodingModel,
    prompt: list[int],
    limit: int,
    most: int,
    sampling: Sampling,
    drafter: Drafter | None,
    generator: torch.Generator | None,
) -> Iterator[Round]:
    """The prefill's one token, then what each forward gives, ``limit`` tokens in all; the caller may stop at any time.

    ``most``: drafts in one forward; fewer at the end, where fewer tokens are wanted.
    """
    caches = [model.cache(1) for _ in model.chunk.layers]
    tokens = torch.tensor([prompt], dtype=torch.int64, device=model.device)
    before, after = model.trunk(tokens, caches)
    if drafter is not None:
        drafter.prefill(DecodingState(tokens, before, after))
    nothing = Proposal(tokens[:, :0], None)
    new = verify(nothing, model.logits(after[:, -1:]), sampling, generator).token.unsqueeze(1)
    before, after = before[:, :0], after[:, :0]
    drafted = 0
    while True:
        yield Round(new[0].tolist(), drafted)
        tokens = torch.cat((tokens, new), dim=1)
        left = len(prompt) + limit - tokens.shape[1]
        if left <= 0:
            return
        drafted = min(most, left - 1)
        proposal = drafter.propose(DecodingState(tokens, before, after), drafted) if drafter is not None and drafted else nothing
        before, after = model.trunk(torch.cat((tokens, proposal.tokens), dim=1), caches)
        verdict = verify(proposal, model.logits(after), sampling, generator)
        kept = int(verdict.accepted)
        new = torch.cat((proposal.tokens[:, :kept], verdict.token.unsqueeze(1)), dim=1)
        for cache in caches:
            cache.crop(tokens.shape[1] + kept)
        before, after = before[:, : kept + 1], after[:, : kept + 1]


def verify(proposal: Proposal, logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Verdict:
    """The trunk's logits [B, γ+1, V] of the last known token and the γ drafts, as greedy decoding or sampling asks."""
    if sampling.greedy:
        return verify_greedy(proposal.tokens, logits)
    return verify_sampled(proposal.tokens, sampling.probabilities(logits), proposal.probabilities, generator)


def until(tokens: list[int], stop: int | None) -> list[int]:
    """The tokens up to the first ``stop``, that one included."""
    return tokens[: tokens.index(stop) + 1] if stop is not None and stop in tokens else tokens
