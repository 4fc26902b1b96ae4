"""What pools run under a layout, by name."""

from tests.distributed.tasks.checkpoints import damage, load_under, make_folder, save_under, write_later_format
from tests.distributed.tasks.decoding import continued, decode
from tests.distributed.tasks.oracle import reference
from tests.distributed.tasks.poison import nonfinite
from tests.distributed.tasks.runs import background_save, copy, evaluate, relay, relist, start_from, train, trouble
from tests.distributed.tasks.step import compiled, drift, parity

__all__ = [
    "background_save",
    "compiled",
    "continued",
    "copy",
    "damage",
    "decode",
    "drift",
    "evaluate",
    "load_under",
    "make_folder",
    "nonfinite",
    "parity",
    "reference",
    "relay",
    "relist",
    "save_under",
    "start_from",
    "train",
    "trouble",
    "write_later_format",
]
