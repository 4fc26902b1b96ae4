"""Rows of a question and its answer, where only the answer is learned.

A target counts only if it lies in one document with the position that predicts it. Attention is told to ignore documents in
these tasks (model.document_mask=false), so document numbers can mark what counts: 0 on the last token of the question and on
the answer, -1 (padding) elsewhere. From the last token of the question the main head then predicts the first token of the
answer, depth 1 the second one, and so on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mtp_dist.data.batch import Batch
from mtp_dist.data.packing import PADDING
from mtp_dist.decoding.model import DecodingModel
from mtp_dist.model.chunk import Chunk


def question_and_answer(questions: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], width: int) -> Batch:
    """Rows of `width` tokens: a question (its last token the sign that the answer follows), its answer, padding."""
    tokens = torch.zeros(len(questions), width, dtype=torch.int64)
    documents = torch.full((len(questions), width), PADDING, dtype=torch.int32)
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        end = len(question) + len(answer)
        tokens[row, :end] = torch.tensor([*question, *answer])
        documents[row, len(question) - 1 : end] = 0
    return Batch(tokens, documents, [[] for _ in questions])


@torch.inference_mode()
def next_tokens(model: Chunk, tokens: Tensor) -> Tensor:
    """tokens int64 [B, T] -> int64 [B, T]: the trunk's choice after each of them, given all before."""
    decoder = DecodingModel(model, tokens.shape[1])
    states = decoder.trunk(tokens.to(decoder.device), decoder.caches(len(tokens))).after_norm
    return decoder.logits(states).argmax(-1).cpu()


def right(model: Chunk, batch: Batch) -> Tensor:
    """Whether the trunk's choice is right where the main head's target counts: bool [B, T-1], and False where none counts.

    A greedy continuation of the question equals the answer exactly where all of a row's are: each choice is then made on the very
    tokens that were chosen before.
    """
    counts = target_counts(batch)
    return (next_tokens(model, batch.tokens)[:, :-1] == batch.tokens[:, 1:]) & counts


def target_counts(batch: Batch) -> Tensor:
    """bool [B, T-1]: whether the main head's target at each position counts."""
    here, there = batch.documents[:, :-1], batch.documents[:, 1:]
    return (here == there) & (here != PADDING)


def exact(model: Chunk, batch: Batch) -> Tensor:
    """bool [B]: the whole answer is what greedy decoding would write."""
    return (right(model, batch) | ~target_counts(batch)).all(1)
