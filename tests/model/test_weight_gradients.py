"""Promise: weight gradients that wait in a queue are those of autograd, also of weights used often, and add up in float32."""

import pytest
import torch
from torch import Tensor, nn

from mtp_dist.model.chunk import Chunk
from mtp_dist.model.linear import Linear
from mtp_dist.model.tensor_group import ALONE
from mtp_dist.model.weight_gradients import WeightGradients, hand_out
from tests.model.small import close, rows, small_model

DOUBLE = 1e-6
"""The head forms its gradient in float32, the rest is float64."""


def backward(chunk: Chunk, tokens: Tensor, documents: Tensor) -> None:
    scale = torch.tensor([[0.1, 0.05, 0.02]]).expand(len(tokens), -1)
    chunk(tokens=tokens, documents=documents, scale=scale)[0].backward()


@pytest.mark.parametrize("tie", [True, False])
def test_a_whole_model(tie: bool) -> None:
    """The tied embedding is used five times: looked up for the trunk and the heads, and three heads project with it."""
    tokens, documents = rows(2)
    plain, deferred = small_model(2, tie=tie), small_model(2, tie=tie)
    backward(plain, tokens, documents)
    queue = WeightGradients()
    deferred.defer_weight_gradients(queue)
    backward(deferred, tokens, documents)
    waiting = {name for name, p in deferred.named_parameters() if p.grad is None}
    assert waiting == {name for name, p in deferred.named_parameters() if p.ndim == 2}, "only vectors have their gradient now"
    queue.take()()
    for (name, want), (_, got) in zip(plain.named_parameters(), deferred.named_parameters(), strict=True):
        assert want.grad is not None
        assert got.grad is not None
        assert close(got.grad, want.grad, DOUBLE), name


def test_micro_batches_add_up_in_any_order_of_their_jobs() -> None:
    """Zero-bubble schedules run the backward of later micro-batches before the weight gradients of earlier ones."""
    tokens, documents = rows(2)
    plain, deferred = small_model(2), small_model(2)
    queue = WeightGradients()
    deferred.defer_weight_gradients(queue)
    jobs = []
    for row in range(3):
        backward(plain, tokens[row : row + 1], documents[row : row + 1])
        backward(deferred, tokens[row : row + 1], documents[row : row + 1])
        jobs.append(queue.take())
    for job in reversed(jobs):
        job()
    for (name, want), (_, got) in zip(plain.named_parameters(), deferred.named_parameters(), strict=True):
        assert want.grad is not None
        assert got.grad is not None
        assert close(got.grad, want.grad, DOUBLE), name


def test_taking_empties_the_queue_and_a_later_job_waits_for_the_next() -> None:
    queue, done = WeightGradients(), []
    queue.add(lambda: done.append(1))
    first = queue.take()
    queue.add(lambda: done.append(2))
    first()
    assert done == [1]
    queue.take()()
    queue.take()()
    assert done == [1, 2]


def test_one_linear_used_twice_in_one_graph() -> None:
    layer = Linear(4, 4, std=1.0, group=ALONE).double()
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    layer(layer(x).tanh()).square().sum().backward()
    want, wanted_input = layer.weight.grad, x.grad
    assert want is not None
    assert wanted_input is not None
    layer.weight.grad = x.grad = None
    queue = WeightGradients()
    hand_out(layer, queue)
    layer(layer(x).tanh()).square().sum().backward()
    assert layer.weight.grad is None
    queue.take()()
    assert layer.weight.grad is not None
    assert x.grad is not None
    assert close(layer.weight.grad, want, 1e-12)
    assert close(x.grad, wanted_input, 1e-12)


def test_a_frozen_weight_queues_nothing() -> None:
    layer = Linear(4, 4, std=1.0, group=ALONE)
    nn.init.ones_(layer.weight)
    layer.weight.requires_grad_(False)
    queue = WeightGradients()
    hand_out(layer, queue)
    x = torch.ones(2, 4, requires_grad=True)
    layer(x).sum().backward()
    queue.take()()
    assert layer.weight.grad is None
    assert x.grad is not None


def test_bfloat16_weights_accumulate_in_float32() -> None:
    """400 gradients of one bfloat16 size: a bfloat16 sum would stick at 256 of them, since 256 + 1 rounds to 256 there."""
    chunk = Linear(1, 1, std=1.0, group=ALONE)
    nn.init.ones_(chunk.weight)
    chunk.bfloat16()
    chunk.weight.grad_dtype = torch.float32
    queue = WeightGradients()
    hand_out(chunk, queue)
    for _ in range(400):
        chunk(torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
        queue.take()()
    assert chunk.weight.grad is not None
    assert chunk.weight.grad.dtype == torch.float32
    assert chunk.weight.grad.item() == 400


def test_look_ups_of_one_token_accumulate_in_float32() -> None:
    from mtp_dist.model.embedding import Embedding

    embedding = Embedding(3, 2, std=1.0, group=ALONE)
    nn.init.ones_(embedding.weight)
    embedding.bfloat16()
    embedding.weight.grad_dtype = torch.float32
    queue = WeightGradients()
    hand_out(embedding, queue)
    embedding(torch.ones(1, 400, dtype=torch.int64)).sum().backward()
    queue.take()()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.tolist() == [[0, 0], [400, 400], [0, 0]]


def test_evaluation_queues_nothing() -> None:
    chunk = small_model(2)
    queue = WeightGradients()
    chunk.defer_weight_gradients(queue)
    tokens, documents = rows(2)
    with torch.no_grad():
        chunk(tokens=tokens, documents=documents, scale=torch.ones(3, 3))
    queue.take()()
    assert all(p.grad is None for p in chunk.parameters())
