"""A text that a run shows while it trains can be read, also where the model writes little but line breaks."""

import pytest

from mtp_dist.training.sample import shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("main():\n    pass\n", "def main():\n    pass"),
        ("\n" * 64, "def [white space alone: 64 characters, 64 line breaks]"),
        ("", "def [white space alone: 0 characters, 0 line breaks]"),
        ("a\n\nb", "def a\n\nb"),
        ("\n\n\n \n\nb\n\n\n\n", "def \n[4 empty lines]\nb\n[3 empty lines]"),
    ],
)
def test_empty_lines_are_counted(text: str, expected: str) -> None:
    assert shown("def ", text) == expected
