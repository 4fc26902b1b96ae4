"""What a rank needs, imported once in the process that ranks are forked from: it takes seconds, a fork takes milliseconds."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed.runtime.pipe.topology  # noqa: F401

import mtp_dist.train
import mtp_dist.training.trainer  # noqa: F401
import tests.distributed.tasks  # noqa: F401
from mtp_dist.parallel.mesh import import_deepspeed

import_deepspeed()
