"""How far a run is. All of it goes into the checkpoint."""

from dataclasses import dataclass


@dataclass
class Progress:
    """`step`: optimizer steps tried. `tokens_seen`: positions read, skipped steps included. `tokens_trained`: positions of
    applied steps; the learning rate and lambda follow these, so a skipped step advances neither. `skipped`, `skipped_in_row`:
    non-finite steps."""

    step: int = 0
    tokens_seen: int = 0
    tokens_trained: int = 0
    skipped: int = 0
    skipped_in_row: int = 0

    def advance(self, tokens: int, *, applied: bool) -> None:
        self.step += 1
        self.tokens_seen += tokens
        if applied:
            self.tokens_trained += tokens
            self.skipped_in_row = 0
        else:
            self.skipped += 1
            self.skipped_in_row += 1
