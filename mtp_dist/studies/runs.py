"""The runs of an experiment, variant by variant and seed by seed. A finished run leaves a file, and is not run again while its
settings are the same: an experiment that was stopped goes on where it was."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mtp_dist.config.compose import changed
from mtp_dist.config.resolution import resolve
from mtp_dist.config.schema import Study
from mtp_dist.config.study import settled
from mtp_dist.config.validation import validate_training
from mtp_dist.errors import UserError
from mtp_dist.json_document import FormError, parsed, typed
from mtp_dist.regular_file import MIB, read_regular
from mtp_dist.studies.experiment import Outcome
from mtp_dist.studies.matching import matched

NOT_THE_RESULT = ("run_dir", "size", "seeds", "variants", "only", "check_only", "launch", "tracker", "checkpoint", "validation")
"""Settings that change nothing in the outcome of one run."""


LARGEST = 256 * MIB
"""Of a file of one run, in bytes."""


@dataclass
class _Kept:
    """The file of a run that is done; ``settings``: the mark of those that it ran with."""

    settings: str
    numbers: dict[str, float]
    curves: dict[str, list[list[float]]]


@dataclass(frozen=True)
class Run:
    """One variant with one seed: resolved settings, and the file of its outcome."""

    variant: str
    config: Study
    file: Path

    def done(self) -> Outcome | None:
        """The outcome of these very settings, if it is there."""
        try:
            content = typed(parsed(read_regular(self.file, LARGEST), nonfinite=True), _Kept)
        except (FileNotFoundError, FormError):
            return None
        except OSError as error:
            raise UserError(f"{self.file} cannot be read: {error.strerror}") from None
        return Outcome(content.numbers, content.curves) if content.settings == _mark(self.config) else None

    def keep(self, outcome: Outcome) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = {"settings": _mark(self.config), "numbers": outcome.numbers, "curves": outcome.curves}
        temporary = self.file.with_suffix(".part")
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(self.file)


def variants(base: Study) -> dict[str, Study]:
    """The settings of every variant that is asked for, by its name. Raises UserError."""
    if not base.seeds or len(set(base.seeds)) < len(base.seeds):
        raise UserError(f"seeds={base.seeds} must be different numbers, at least one")
    where = f"conf/study/{base.experiment}_{base.size}.yaml"
    if not base.variants:
        raise UserError(f"variants is empty in {where}; name one at least")
    for name in base.only:
        if name not in base.variants:
            raise UserError(f"only={name}: experiment={base.experiment} size={base.size} has {', '.join(base.variants)}")
    names = [name for name in base.variants if name in base.only or not base.only]
    return {name: settled(changed(base, base.variants[name], f"variant {name} of {where}")) for name in names}


def checked(config: Study, vocabulary: int | None) -> Study:
    """One variant, valid, with derived settings filled. `vocabulary`: of its dataset. Raises UserError."""
    validate_training(config, vocabulary)
    full = resolve(config, vocabulary)
    assert isinstance(full, Study)
    if full.model.vocab_size is None:
        return full
    full = matched(full)
    validate_training(full, vocabulary)
    return full


def runs(config: Study, variant: str) -> Iterator[Run]:
    """One for each seed. `config`: of the variant, checked."""
    for seed in config.seeds:
        own = copy.deepcopy(config)
        own.seed = seed
        yield Run(variant, own, Path(config.run_dir) / "runs" / variant / f"seed_{seed}.json")


def outcome_of(run: Run, measure: Callable[[Study], Outcome]) -> tuple[Outcome, bool]:
    """From its file, or measured now (True)."""
    before = run.done()
    if before is not None:
        return before, False
    found = measure(run.config)
    run.keep(found)
    return found, True


def _mark(config: Study) -> str:
    content = {key: value for key, value in asdict(config).items() if key not in NOT_THE_RESULT}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
