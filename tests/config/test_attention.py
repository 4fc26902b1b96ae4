"""Promise: auto takes the first attention that device and settings allow, and says why; a named one is taken or refused."""

import pytest

from mtp_dist.config import versions
from mtp_dist.config.attention import BACKENDS, DEVICES, choose, obstacle, possible
from mtp_dist.config.schema import TrainingRun
from mtp_dist.errors import UserError


def run(attention: str = "auto", *, documents: bool = True, dtype: str = "bfloat16", recompute: str = "none") -> TrainingRun:
    config = TrainingRun()
    config.model.document_mask, config.train.attention = documents, attention
    config.train.dtype, config.train.recompute = dtype, recompute
    return config


@pytest.mark.parametrize(
    ("config", "device", "shown"),
    [
        (run(), "cpu", "masked (documents; cpu)"),
        (run(), "cuda", "varlen (documents; cuda)"),
        (run(dtype="float32"), "cuda", "flex (documents, not varlen: its kernel takes bfloat16, not train.dtype=float32; cuda)"),
        (run(documents=False), "cpu", "causal (model.document_mask=false; cpu)"),
        (run(documents=False), "cuda", "causal (model.document_mask=false; cuda)"),
        (run("masked"), "cuda", "masked (train.attention=masked; cuda)"),
    ],
)
def test_the_choice_and_its_reason(config: TrainingRun, device: str, shown: str) -> None:
    assert str(choose(config.model, config.train, device)) == shown


def test_an_older_torch_lacks_grouped_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "numbers", lambda name: (2, 11))
    config = run()
    assert choose(config.model, config.train, "cuda").backend == "flex"
    config.model.kv_heads = config.model.heads
    assert choose(config.model, config.train, "cuda").backend == "varlen"


def test_auto_ends_at_the_mask() -> None:
    config = run(dtype="float32", recompute="selective")
    choice = choose(config.model, config.train, "cuda")
    assert choice.backend == "masked"
    assert "not varlen: " in choice.why
    assert "not flex: " in choice.why


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("documents", [True, False])
def test_a_named_backend_is_taken_or_refused(attention: str, device: str, documents: bool) -> None:
    config = run(attention, documents=documents)
    if (reason := obstacle(attention, config.model, config.train, device)) is None:
        assert choose(config.model, config.train, device).backend == attention
        return
    with pytest.raises(UserError, match=r"train\.attention=auto") as caught:
        choose(config.model, config.train, device)
    assert reason in str(caught.value)


def test_a_device_left_open_leaves_the_choice_open() -> None:
    """A plan names both, and only what can run."""
    assert [choice.backend for choice in possible(run())] == ["masked", "varlen"]
    assert [choice.device for choice in possible(run("varlen"))] == ["cuda"]
    config = run()
    config.launch.device = "cuda"
    assert [choice.backend for choice in possible(config)] == ["varlen"]
