"""Promise: a skipped step counts as tried and its tokens as seen, but nothing that the learning rate or lambda follow moves."""

from dataclasses import asdict

from mtp_dist.training.progress import Progress


def test_applied_steps_advance_everything() -> None:
    progress = Progress()
    for _ in range(3):
        progress.advance(100, applied=True)
    assert progress == Progress(step=3, tokens_seen=300, tokens_trained=300)


def test_skipped_steps_train_nothing() -> None:
    progress = Progress(step=3, tokens_seen=300, tokens_trained=300)
    progress.advance(100, applied=False)
    progress.advance(100, applied=False)
    assert progress == Progress(step=5, tokens_seen=500, tokens_trained=300, skipped=2, skipped_in_row=2)


def test_only_skips_in_a_row_are_a_row() -> None:
    progress = Progress()
    rows = []
    for applied in (False, False, True, False, True):
        progress.advance(10, applied=applied)
        rows.append(progress.skipped_in_row)
    assert rows == [1, 2, 0, 1, 0]
    assert progress.skipped == 3


def test_a_checkpoint_brings_it_back_whole() -> None:
    progress = Progress(7, 70, 60, 1, 1)
    assert Progress(**asdict(progress)) == progress
