"""Promise: ``SimpleMTP`` is the notebook's model as it was meant, position by position; the kind of head `notebook` is the same
function; and each thing that the notebook's code does instead is as the docstring says."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_dist.config.compose import compose
from mtp_dist.config.schema import TrainingRun
from mtp_dist.model.mtp.heads import TrunkStates
from mtp_dist.model.mtp.notebook import NotebookHeads, SimpleMTP, rms_norm
from tests.model.small import close, rows, small_model

B, T, WIDTH, VOCABULARY, DEPTH = 3, 9, 8, 11, 3


@pytest.fixture
def model() -> SimpleMTP:
    """float64, every weight away from ones and zeros."""
    torch.manual_seed(2)
    model = SimpleMTP(WIDTH, VOCABULARY, DEPTH, feed_forward=12).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(4))


def one_by_one(model: SimpleMTP, tokens: Tensor, init_hidden: Tensor | None) -> Tensor:
    """By torch's own layers, called for one row, one position and one depth at a time."""
    out = []
    for b in range(len(tokens)):
        row = []
        for i in range(tokens.shape[1] - model.num_heads):
            state = model.embed.weight[tokens[b, i]] if init_hidden is None else init_hidden[b, i]
            found = []
            for k in range(1, model.num_heads + 1):
                joined = torch.cat((state, model.embed.weight[tokens[b, i + k]]))
                x = model.projections[k - 1](joined)
                x = x / torch.sqrt((x * x + 1e-8).mean())
                state = model.layers[k - 1](x.view(1, 1, -1)).view(-1)
                found.append(model.embed.weight @ state)
            row.append(torch.stack(found))
        out.append(torch.stack(row))
    return torch.stack(out)


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Depth k at position i predicts token i+k+1; the last depth's last target lies beyond the row and does not count."""
    terms = [
        F.cross_entropy(logits[b, i, k - 1], tokens[b, i + k + 1])
        for b in range(B)
        for i in range(T - DEPTH)
        for k in range(1, DEPTH + 1)
        if i + k + 1 < T
    ]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("given", [False, True])
def test_equals_a_loop_over_positions(model: SimpleMTP, tokens: Tensor, given: bool) -> None:
    hidden = [torch.randn(B, T, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(6)) for _ in range(2)]
    hidden[1] = hidden[0].clone()
    found = []
    for start, run in zip(hidden, (model, lambda *inputs: one_by_one(model, *inputs)), strict=True):
        model.zero_grad()
        start.requires_grad_()
        logits = run(tokens, start if given else None)
        loss = loss_of(logits, tokens)
        loss.backward()
        zero = torch.zeros(())
        gradients = {name: zero.expand(p.shape) if p.grad is None else p.grad for name, p in model.named_parameters()}
        found.append((logits, loss, gradients | ({"init_hidden": start.grad} if given else {})))
    (logits, loss, gradients), (want, want_loss, want_gradients) = found
    assert logits.shape == (B, T - DEPTH, DEPTH, VOCABULARY)
    torch.testing.assert_close(logits, want)
    torch.testing.assert_close(loss, want_loss)
    for name, gradient in want_gradients.items():
        assert gradient is not None
        torch.testing.assert_close(gradients[name], gradient, msg=name)
        queries_and_keys = gradient[: 2 * WIDTH] if "in_proj" in name else None
        assert gradient.any() and (queries_and_keys is None or queries_and_keys.abs().max() < 1e-12), name


def test_too_few_tokens_are_refused(model: SimpleMTP, tokens: Tensor) -> None:
    assert model(tokens[:, : DEPTH + 1]).shape[1] == 1
    with pytest.raises(ValueError, match="3 tokens are too few for 3 heads"):
        model(tokens[:, :DEPTH])


def test_the_kind_of_head_is_the_same_function() -> None:
    """`mtp=notebook` on a trunk's output is the class on the same ``init_hidden``."""
    preset = compose("train", TrainingRun, ["mtp=notebook"]).mtp
    chunk = small_model(preset.depth, kind="notebook", concat=preset.concat, h0=preset.h0)
    heads, model = chunk.mtp, SimpleMTP(8, 13, preset.depth, feed_forward=6).double()
    assert isinstance(heads, NotebookHeads)
    assert chunk.embedding is not None and chunk.norm is not None
    own = dict(heads.named_parameters())
    names = {"output": "self_attn.out_proj", "attention_norm": "norm1", "up": "linear1", "down": "linear2", "mlp_norm": "norm2"}
    with torch.no_grad():
        model.embed.weight.copy_(chunk.embedding.weight)
        for k, (projection, layer) in enumerate(zip(model.projections, model.layers, strict=True), start=1):
            for leaf in ("weight", "bias"):
                getattr(projection, leaf).copy_(own[f"{k}.projection.{leaf}"])
                getattr(layer.self_attn, f"in_proj_{leaf}")[-8:].copy_(own[f"{k}.block.1.value.{leaf}"])
                for name, theirs in names.items():
                    getattr(layer.get_submodule(theirs), leaf).copy_(own[f"{k}.block.1.{name}.{leaf}"])
    tokens, _ = rows(preset.depth)
    after = torch.randn(3, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    embedded = [chunk.embedding(tokens[:, k : k + 6]) for k in range(1, preset.depth + 1)]
    states = heads(TrunkStates(torch.full_like(after, torch.nan), after, chunk.norm), lambda k, _: embedded[k - 1], after, None)
    got = torch.stack([state @ chunk.embedding.weight.T for state in states], dim=2)
    want = model(tokens[:, : 6 + preset.depth], torch.cat((after, after[:, :1].expand(-1, preset.depth, -1)), dim=1))
    torch.testing.assert_close(got, want)
    assert close(got, want, 1e-12)


def test_rows_do_not_meet_but_in_the_source_they_do(model: SimpleMTP, tokens: Tensor) -> None:
    """batch_first=False takes [B, 1, d] for one sequence of B positions."""
    other = tokens.clone()
    other[1:] = (other[1:] + 1) % VOCABULARY
    assert model(tokens)[0].equal(model(other)[0])
    layer, x = nn.TransformerEncoderLayer(WIDTH, 2, dropout=0.0), torch.randn(B, 1, WIDTH)
    changed = x.clone()
    changed[1:] += 1
    assert not layer.self_attn.batch_first
    assert (layer(x)[0] - layer(changed)[0]).abs().max() > 1e-3


def test_a_training_pass_is_not_random_but_in_the_source_it_is(model: SimpleMTP, tokens: Tensor) -> None:
    """torch's layer drops a tenth unless told otherwise."""
    model.train()
    assert model(tokens).equal(model(tokens))
    layer, x = nn.TransformerEncoderLayer(WIDTH, 2), torch.randn(B, 1, WIDTH)
    assert layer.dropout.p == 0.1
    assert not layer(x).equal(layer(x))


def test_the_norm_has_an_eps_but_in_the_source_it_is_lost() -> None:
    """`keepdim=True+eps` is the number 1.00000001 for `keepdim`: an error, and never a part of the mean."""
    x = torch.zeros(2, 4)
    assert rms_norm(x).equal(x)
    with pytest.raises(TypeError, match="keepdim"):
        x.pow(2).mean(dim=-1, keepdim=True + 1e-8)
    assert (x / x.pow(2).mean(dim=-1, keepdim=True).sqrt()).isnan().all()
    small = torch.randn(2, 4, dtype=torch.float64) * 1e-4
    torch.testing.assert_close(rms_norm(small), small / ((small * small).mean(dim=-1, keepdim=True) + 1e-8).sqrt())
