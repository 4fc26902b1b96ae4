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
Own = list[list[bool]]
"""Of one row: entry (i, k-1) says that depth k at position i reads what depth k-1 predicts there."""


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


def trunk_states(weights: Weights, model: ModelConfig, tokens: list[int], documents: list[int]) -> list[Vectors]:
    """The states that enter layers 0, 1, .. and that leave the last."""
    states = [[weights["embedding.weight"][token] for token in tokens]]
    for layer in range(model.layers):
        states.append(block(weights, f"layers.{layer}", model, states[-1], documents))
    return states


def eagle_heads(
    weights: Weights, model: ModelConfig, mtp: MTPConfig, features: Vectors, tokens: list[int], documents: list[int]
) -> list[Vectors]:
    """What EAGLE draws of `features`, f: entry (k, i) is for f[i+k], k = 1 .. D."""
    drawn = [features]
    for k in range(1, mtp.depth + 1):
        joined = []
        for i, feature in enumerate(drawn[-1]):
            embedded = weights["embedding.weight"][tokens[i + k]]
            parts = [embedded, feature] if mtp.concat == "embedding_first" else [feature, embedded]
            joined.append(weights["mtp.1.projection.weight"] @ torch.cat(parts))
        drawn.append(blocks(weights, "mtp.1.block", model, mtp, joined, documents[: len(joined)]))
    return drawn[1:]


def eagle3_heads(
    weights: Weights, model: ModelConfig, mtp: MTPConfig, states: list[Vectors], tokens: list[int], documents: list[int]
) -> list[Vectors]:
    """EAGLE-3 as a draft from every position, token by token, with a cache of its own; `states`: those that it joins. Entry
    (k, i) is what the output head reads."""
    width, positions = model.head_dim, len(states[0])
    assert width is not None
    of_attention = "mtp.1.attention"

    def joined(state: Tensor, token: int) -> Tensor:
        parts = [
            norm(weights["embedding.weight"][token], weights["mtp.1.embedding_norm.weight"], model.norm_eps),
            norm(state, weights["mtp.1.hidden_norm.weight"], model.norm_eps),
        ]
        return torch.cat(parts if mtp.concat == "embedding_first" else parts[::-1])

    def entry(x: Tensor, position: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of each key head."""
        key, value = weights[f"{of_attention}.key.weight"] @ x, weights[f"{of_attention}.value.weight"] @ x
        parts = [slice(head * width, (head + 1) * width) for head in range(model.kv_heads)]
        return [turned(key[part], position, model.rope_theta) for part in parts], [value[part] for part in parts]

    def attended(x: Tensor, position: int, cache: list[tuple[list[Tensor], list[Tensor]]]) -> Tensor:
        query, heads = weights[f"{of_attention}.query.weight"] @ x, []
        for head in range(model.heads):
            group = head // (model.heads // model.kv_heads)
            mine = turned(query[head * width : (head + 1) * width], position, model.rope_theta)
            scores = [(mine @ keys[group] / math.sqrt(width)).exp() for keys, _ in cache]
            heads.append(sum(score * values[group] for score, (_, values) in zip(scores, cache, strict=True)) / sum(scores))
        return weights[f"{of_attention}.output.weight"] @ torch.cat(heads)  # type: ignore[arg-type]

    fused = [weights["mtp.1.fusion.weight"] @ torch.cat([of_layer[i] for of_layer in states]) for i in range(positions)]
    of_trunk = [entry(joined(fused[j], tokens[j + 1]), j) for j in range(positions)]
    found: list[Vectors] = [[] for _ in range(mtp.depth)]
    for i in range(positions):
        cache = [of_trunk[j] for j in range(i + 1) if documents[j] == documents[i] or not model.document_mask]
        hidden = fused[i]
        for k in range(1, mtp.depth + 1):
            x = joined(hidden, tokens[i + k])
            if k > 1:
                cache.append(entry(x, i + k - 1))
            hidden = hidden + attended(x, i + k - 1, cache)
            inner = norm(hidden, weights["mtp.1.mlp_norm.weight"], model.norm_eps)
            gate, up = weights["mtp.1.mlp.gate.weight"] @ inner, weights["mtp.1.mlp.up.weight"] @ inner
            hidden = hidden + weights["mtp.1.mlp.down.weight"] @ (gate / (1 + (-gate).exp()) * up)
            found[k - 1].append(norm(hidden, weights["mtp.1.norm.weight"], model.norm_eps))
    return found


def smooth_l1(got: Tensor, want: Tensor) -> Tensor:
    """Its mean over the elements."""
    errors = [(a - b).abs() for a, b in zip(got, want, strict=True)]
    return torch.stack([e * e / 2 if e < 1 else e - 0.5 for e in errors]).mean()


def matrix_of(weights: Weights, model: ModelConfig, mtp: MTPConfig, k: int) -> Tensor:
    """[V, d]: what depth k (0: the main head) predicts with."""
    if k and mtp.projection == "own":
        return weights["mtp.1.head.weight" if mtp.repeat else f"mtp.{k}.head.weight"]
    return weights["embedding.weight"] if model.tie_embeddings else weights["head.weight"]


def fed(
    weights: Weights, model: ModelConfig, mtp: MTPConfig, k: int, i: int, before: Tensor, tokens: list[int], own: Own | None
) -> Tensor:
    """What depth k reads at position i: the embedding of the target of depth k-1, or where `own` says so of the token that depth
    k-1 itself names likeliest of its state there, `before`."""
    token = tokens[i + 1 + (k - 1) * mtp.stride]
    if own is not None and own[i][k - 1]:
        matrix = matrix_of(weights, model, mtp, k - 1)
        logits = [float(row @ before) for row in matrix.detach()]
        token = logits.index(max(logits))
    if mtp.embedding == "own":
        return weights["mtp.1.embedding.weight" if mtp.repeat else f"mtp.{k}.embedding.weight"][token]
    return weights["embedding.weight"][token]


def heads(
    weights: Weights,
    model: ModelConfig,
    mtp: MTPConfig,
    before: Vectors,
    after: Vectors,
    tokens: list[int],
    documents: list[int],
    own: Own | None,
) -> list[Vectors]:
    """h^1 .. h^D of one row as output heads read them; `before` and `after`: the trunk around its final norm."""
    hidden = after if mtp.h0 == "post_norm" else before
    states: list[Vectors] = []
    for k in range(1, mtp.depth + 1):
        name = "mtp.1" if mtp.repeat else f"mtp.{k}"
        ready, joined = states[-1] if states else after, []
        for i, h in enumerate(hidden):
            embedded = fed(weights, model, mtp, k, i, ready[i], tokens, own)
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


def notebook_heads(
    weights: Weights,
    model: ModelConfig,
    mtp: MTPConfig,
    before: Vectors,
    after: Vectors,
    tokens: list[int],
    own: Own | None,
) -> list[Vectors]:
    """One position after the other: its projection, its norm, and layers in which it meets no other position."""

    def affine(name: str, x: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def normed(name: str, x: Tensor) -> Tensor:
        return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    states: list[Vectors] = [[] for _ in range(mtp.depth)]
    for i, state in enumerate(after if mtp.h0 == "post_norm" else before):
        for k in range(1, mtp.depth + 1):
            name = "mtp.1" if mtp.repeat else f"mtp.{k}"
            ready = states[k - 2][i] if k > 1 else after[i]
            parts = [state, fed(weights, model, mtp, k, i, ready, tokens, own)]
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


def row_states(
    weights: Weights, model: ModelConfig, mtp: MTPConfig, tokens: list[int], documents: list[int], own: Own | None = None
) -> tuple[list[Vectors], list[list[Tensor]]]:
    """h^0 (normed), h^1 .. h^D of one row of S + 1 + D tokens; and eagle's distances of depth 1 .. D, as many positions as have
    one. own: where depths read their own predictions."""
    positions = len(tokens) - 1 - mtp.depth * mtp.stride
    states = trunk_states(weights, model, tokens[:positions], documents[:positions])
    xs = states[-1]

    def normed(vectors: Vectors) -> Vectors:
        return [norm(x, weights["norm.weight"], model.norm_eps) for x in vectors]

    after = normed(xs)
    if mtp.kind == "parallel":
        return [after, *parallel_heads(weights, model, mtp, states[-2], xs, documents)], []
    if mtp.kind == "medusa":
        return [after, *medusa_heads(weights, mtp, after)], []
    if mtp.kind == "notebook":
        return [after, *notebook_heads(weights, model, mtp, xs, after, tokens, own)], []
    if mtp.kind == "eagle3":
        joined = [states[layer] for layer in (mtp.taps or [0, 1, 2])]
        return [after, *eagle3_heads(weights, model, mtp, joined, tokens, documents)], []
    if mtp.kind == "eagle":
        features = after if mtp.h0 == "post_norm" else xs
        drawn = eagle_heads(weights, model, mtp, features, tokens, documents)
        distances = [
            [smooth_l1(drawn[k - 1][i], features[i + k]) for i in range(positions - k)] for k in range(1, mtp.depth + 1)
        ]
        return [after, *(drawn if mtp.h0 == "post_norm" else map(normed, drawn))], distances
    return [after, *heads(weights, model, mtp, xs, after, tokens, documents, own)], []


def losses(
    weights: Weights,
    model: ModelConfig,
    mtp: MTPConfig,
    tokens: list[list[int]],
    documents: list[list[int]],
    drafted: list[int] | None = None,
    own: list[Own] | None = None,
) -> tuple[Tensor, list[Tensor], list[int]]:
    """(L = lambda_0 L_main + lambda / D * sum_k w_k L_k, [L_main, L_1 .. L_D], valid targets of each) of a whole batch; an L_k
    without valid targets is 0; what is not among the `drafted` tokens has no loss. With `targets` of the trunk a term is -sum_v
    p(v) log q(v), p what the main head says at i + k, a constant. own: of each row."""
    head = weights["embedding.weight"] if model.tie_embeddings else weights["head.weight"]
    sums = [torch.zeros((), dtype=head.dtype) for _ in range(mtp.depth + 1)]
    counts = [0] * (mtp.depth + 1)
    for row, documents_of_row, own_of_row in zip(tokens, documents, own or [None] * len(tokens), strict=True):
        every, distances = row_states(weights, model, mtp, row, documents_of_row, own_of_row)
        for k, states in enumerate(every):
            soft = k > 0 and mtp.targets == "trunk"
            drawn = k > 0 and mtp.kind == "eagle"
            for i, state in enumerate(states):
                one_document = documents_of_row[i] >= 0 and len(set(documents_of_row[i : i + 2 + k * mtp.stride])) == 1
                if not one_document or ((soft or drawn) and i + k >= len(states)):
                    continue
                matrix = matrix_of(weights, model, mtp, k)
                among = drafted if k and drafted is not None else list(range(len(matrix)))
                logits = torch.stack([matrix[v] @ state for v in among])
                if soft:
                    taught = (head @ every[0][i + k]).exp().detach()
                    known = [taught[v] / taught.sum() for v in among]
                else:
                    known = [float(v == row[i + 1 + k * mtp.stride]) for v in among]
                loss = sum(part * (logits.exp().sum().log() - logit) for part, logit in zip(known, logits, strict=True))
                if drawn:
                    loss = distances[k - 1][i] + mtp.cross_entropy_weight * loss
                sums[k] = sums[k] + loss
                counts[k] += 1
    means = [total / max(count, 1) for total, count in zip(sums, counts, strict=True)]
    depth_weights = mtp.depth_weights or [mtp.decay ** (k - 1) for k in range(1, mtp.depth + 1)]
    extra = sum(w * mean for w, mean in zip(depth_weights, means[1:], strict=True))
    return mtp.main_loss_weight * means[0] + mtp.loss_weight / max(mtp.depth, 1) * extra, means, counts
