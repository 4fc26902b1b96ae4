"""Numbers with their nouns, as messages print them."""


def counted(number: float, noun: str, plural: str | None = None, *, commas: bool = False) -> str:
    """``1 step``, ``2 steps``, ``1,000 tokens`` (``commas``). ``plural``: where it is not the noun and an s."""
    shown = f"{number:g}" if isinstance(number, float) else f"{number:,}" if commas else f"{number}"
    return f"{shown} {noun if number == 1 else plural or f'{noun}s'}"
