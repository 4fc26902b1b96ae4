"""The whole model as plain loops over rows, positions, heads and pairs, written from the equations: an oracle.

Sources: DeepSeek-V3, arXiv 2412.19437, eq. 21-25; RMSNorm 1910.07467; rotary positions 2104.09864; grouped queries 2305.13245;
SwiGLU 2002.05202. It reads nothing of the model but its weights (by global name) and its settings. A state is a vector [d].
"""

import math

import torch
from torch import Tensor

from mtp_dist.config.schema import ModelConfig, MTPConfig

Weights = dict[str, Tensor]
Vectors = list[Tensor]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (sum(value * value for value in x) / len(x) + eps).sqrt() * weight


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """Pair (j, j + c/2) turned by position * theta^(-2j/c)."""
    half = len(x) // 2
    first, second = [], []
    for j in range(half):
        angle = position * theta ** (-2 * j / len(x))
        first.append(x[j] * math.cos(angle) - x[j + half] * math.sin(angle))
        second.append(x[j + half] * math.cos(angle) + x[j] * math.sin(angle))
    return torch.stack(first + second)


def attention(weights: Weights, name: str, model: ModelConfig, xs: Vectors, documents: list[int]) -> Vectors:
    width = model.head_dim
    assert width is not None
    queries = [weights[f"{name}.query.weight"] @ x for x in xs]
    keys = [weights[f"{name}.key.weight"] @ x for x in xs]
    values = [weights[f"{name}.value.weight"] @ x for x in xs]
    out = []
    for i in range(len(xs)):
        seen = [j for j in range(i + 1) if documents[j] == documents[i] or not model.document_mask]
        heads = []
        for head in range(model.heads):
            group = head // (model.heads // model.kv_heads)
            mine, theirs = slice(head * width, (head + 1) * width), slice(group * width, (group + 1) * width)
            query = turned(queries[i][mine], i, model.rope_theta)
            scores = [query @ turned(keys[j][theirs], j, model.rope_theta) / math.sqrt(width) for j in seen]
            total = sum(score.exp() for score in scores)
            shares = [score.exp() / total for score in scores]
            heads.append(torch.stack([share * values[j][theirs] for share, j in zip(shares, seen, strict=True)]).sum(0))
        out.append(weights[f"{name}.output.weight"] @ torch.cat(heads))
    return out


def block(weights: Weights, name: str, model: ModelConfig, xs: Vectors, documents: list[int]) -> Vectors:
    normed = [norm(x, weights[f"{name}.attention_norm.weight"], model.norm_eps) for x in xs]
    attended = attention(weights, f"{name}.attention", model, normed, documents)
    out = []
    for x, seen in zip(xs, attended, strict=True):
        x = x + seen
        inner = norm(x, weights[f"{name}.mlp_norm.weight"], model.norm_eps)
        gate = weights[f"{name}.mlp.gate.weight"] @ inner
        up = weights[f"{name}.mlp.up.weight"] @ inner
        out.append(x + weights[f"{name}.mlp.down.weight"] @ (gate / (1 + (-gate).exp()) * up))
    return out


def blocks(weights: Weights, name: str, model: ModelConfig, mtp: MTPConfig, xs: Vectors, documents: list[int]) -> Vectors:
    """A module's blocks: one without a number in its name, or several."""
    if mtp.blocks == 1:
        return block(weights, name, model, xs, documents)
    for number in range(1, mtp.blocks + 1):
        xs = block(weights, f"{name}.{number}", model, xs, documents)
    return xs


def parallel_heads(
    weights: Weights, model: ModelConfig, mtp: MTPConfig, entering: Vectors, before: Vectors, documents: list[int]
) -> list[Vectors]:
    """Gloeckle's heads; `entering` and `before`: the states that enter and leave the trunk's last block."""
    z = entering if mtp.branch == "penultimate" else before
    states = []
    for k in range(1, mtp.depth + 1):
        out = blocks(weights, f"mtp.{k}.block", model, mtp, z, documents[: len(z)])
        states.append([norm(x, weights["norm.weight"], model.norm_eps) for x in out])
    return states


def medusa_heads(weights: Weights, mtp: MTPConfig, after: Vectors) -> list[Vectors]:
    states = []
    for k in range(1, mtp.depth + 1):
        xs = after
        for r in range(1, mtp.blocks + 1):
            name, out = f"mtp.{k}.block.{r}", []
            for x in xs:
                inner = weights[f"{name}.linear.weight"] @ x + weights[f"{name}.linear.bias"]
                out.append(x + inner / (1 + (-inner).exp()))
            xs = out
        states.append(xs)
    return states


def heads(
    weights: Weights, model: ModelConfig, mtp: MTPConfig, before: Vectors, after: Vectors, tokens: list[int], documents: list[int]
) -> list[Vectors]:
    """h^1 .. h^D of one row as the shared output head reads them; `before` and `after`: the trunk around its final norm."""
    hidden = after if mtp.h0 == "post_norm" else before
    states = []
    for k in range(1, mtp.depth + 1):
        name = "mtp.1" if mtp.repeat else f"mtp.{k}"
        joined = []
        for i, h in enumerate(hidden):
            embedded = weights["embedding.weight"][tokens[i + k]]
            parts = [
                norm(embedded, weights[f"{name}.embedding_norm.weight"], model.norm_eps),
                norm(h, weights[f"{name}.hidden_norm.weight"], model.norm_eps),
            ]
            if mtp.concat == "hidden_first":
                parts.reverse()
            joined.append(weights[f"{name}.projection.weight"] @ torch.cat(parts))
        raw = blocks(weights, f"{name}.block", model, mtp, joined, documents[: len(hidden)])
        state = [norm(x, weights[f"{name}.norm.weight"], model.norm_eps) for x in raw]
        hidden = state if mtp.recycle == "post_norm" else raw
        states.append(state)
    return states


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = sum(value for value in x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def notebook_heads(weights: Weights, mtp: MTPConfig, before: Vectors, after: Vectors, tokens: list[int]) -> list[Vectors]:
    """One position after the other: its projection, its norm, and layers in which it meets no other position."""

    def affine(name: str, x: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def normed(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    states: list[Vectors] = [[] for _ in range(mtp.depth)]
    for i, state in enumerate(after if mtp.h0 == "post_norm" else before):
        for k in range(1, mtp.depth + 1):
            name = "mtp.1" if mtp.repeat else f"mtp.{k}"
            parts = [state, weights["embedding.weight"][tokens[i + k]]]
            if mtp.concat == "embedding_first":
                parts.reverse()
            state = affine(f"{name}.projection", torch.cat(parts))
            state = state / (sum(value * value for value in state) / len(state) + 1e-8).sqrt()
            for r in range(1, mtp.blocks + 1):
                layer = f"{name}.block.{r}"
                attended = affine(f"{layer}.output", affine(f"{layer}.value", state))
                state = normed(f"{layer}.attention_norm", state + attended)
                inner = affine(f"{layer}.up", state)
                state = normed(f"{layer}.mlp_norm", state + affine(f"{layer}.down", inner * (inner > 0)))
            states[k - 1].append(state)
    return states


def row_states(weights: Weights, model: ModelConfig, mtp: MTPConfig, tokens: list[int], documents: list[int]) -> list[Vectors]:
    """h^0 (normed), h^1 .. h^D of one row of S + 1 + D tokens."""
    positions = len(tokens) - 1 - mtp.depth
    xs = [weights["embedding.weight"][token] for token in tokens[:positions]]
    entering = xs
    for layer in range(model.layers):
        entering = xs
        xs = block(weights, f"layers.{layer}", model, xs, documents[:positions])
    after = [norm(x, weights["norm.weight"], model.norm_eps) for x in xs]
    if mtp.kind == "parallel":
        return [after, *parallel_heads(weights, model, mtp, entering, xs, documents)]
    if mtp.kind == "medusa":
        return [after, *medusa_heads(weights, mtp, after)]
    if mtp.kind == "notebook":
        return [after, *notebook_heads(weights, mtp, xs, after, tokens)]
    return [after, *heads(weights, model, mtp, xs, after, tokens, documents)]


def losses(
    weights: Weights, model: ModelConfig, mtp: MTPConfig, tokens: list[list[int]], documents: list[list[int]]
) -> tuple[Tensor, list[Tensor], list[int]]:
    """(L = L_main + lambda / D * sum_k w_k L_k, [L_main, L_1 .. L_D], valid targets of each) of a whole batch; an L_k without
    valid targets is 0. With `targets` of the trunk a term is -sum_v p(v) log q(v), p what the main head says at i + k, a
    constant."""
    head = weights["embedding.weight"] if model.tie_embeddings else weights["head.weight"]
    sums = [torch.zeros((), dtype=head.dtype) for _ in range(mtp.depth + 1)]
    counts = [0] * (mtp.depth + 1)
    for row, documents_of_row in zip(tokens, documents, strict=True):
        every = row_states(weights, model, mtp, row, documents_of_row)
        for k, states in enumerate(every):
            soft = k > 0 and mtp.targets == "trunk"
            for i, state in enumerate(states):
                one_document = documents_of_row[i] >= 0 and len(set(documents_of_row[i : i + k + 2])) == 1
                if not one_document or (soft and i + k >= len(states)):
                    continue
                own = k > 0 and mtp.projection == "own"
                logits = (weights[f"mtp.{k}.head.weight"] if own else head) @ state
                if soft:
                    taught = (head @ every[0][i + k]).exp().detach()
                    wanted = sum(taught[v] * logits[v] for v in range(len(logits))) / taught.sum()
                else:
                    wanted = logits[row[i + k + 1]]
                sums[k] = sums[k] + logits.exp().sum().log() - wanted
                counts[k] += 1
    means = [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]
    depth_weights = mtp.depth_weights or [mtp.decay ** (k - 1) for k in range(1, mtp.depth + 1)]
    extra = sum(w * mean for w, mean in zip(depth_weights, means[1:], strict=True))
    return means[0] + mtp.loss_weight / max(mtp.depth, 1) * extra, means, counts
