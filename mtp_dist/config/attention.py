"""Which attention backend a run takes on a device, and why. Asked before torch is loaded, and again once the device is known.

What each backend can do is torch's matter (2.13): see ``model/attention.py``, which runs them.
"""

from dataclasses import dataclass
from importlib.util import find_spec

from mtp_dist.config import versions
from mtp_dist.config.schema import ModelConfig, TrainConfig, TrainingRun
from mtp_dist.errors import UserError

BACKENDS = ("causal", "masked", "varlen", "flex")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Choice:
    """A backend on a device (cpu, cuda), and in a few words why this one."""

    backend: str
    device: str
    why: str

    def __str__(self) -> str:
        return f"{self.backend} ({self.why}; {self.device})"


def choose(model: ModelConfig, train: TrainConfig, device: str, capability: tuple[int, int] | None = None) -> Choice:
    """What ``train.attention`` means on a device, of this CUDA compute capability where it is known. Raises UserError where it
    cannot run there."""
    wanted = train.attention
    if wanted != "auto":
        require(model, train, device, capability)
        return Choice(wanted, device, f"train.attention={wanted}")
    if not model.document_mask:
        return Choice("causal", device, "model.document_mask=false")
    passed = []
    for backend in ("varlen", "flex"):
        reason = obstacle(backend, model, train, device, capability)
        if reason is None:
            break
        passed.append(f"not {backend}: {reason}")
    else:
        backend = "masked"
    return Choice(backend, device, ", ".join(["documents", *(passed if device == "cuda" else [])]))


def require(model: ModelConfig, train: TrainConfig, device: str | None, capability: tuple[int, int] | None = None) -> None:
    """Raise UserError where ``train.attention`` names a backend that cannot run; device None: not known yet."""
    if train.attention == "auto":
        return
    reason = obstacle(train.attention, model, train, device, capability)
    if reason is None:
        return
    fitting = [name for name in BACKENDS if obstacle(name, model, train, device, capability) is None]
    way_out = "model.document_mask=false where every row is one document, or " if train.attention == "causal" else ""
    raise UserError(f"train.attention={train.attention}: {reason}; choose {way_out}train.attention=auto ({' or '.join(fitting)})")


def possible(config: TrainingRun) -> list[Choice]:
    """The choice on the run's device; on either where ``launch.device=auto`` leaves it open."""
    devices = DEVICES if config.launch.device == "auto" else (config.launch.device,)
    model, train = config.model, config.train
    fit = [device for device in devices if train.attention == "auto" or obstacle(train.attention, model, train, device) is None]
    return [choose(model, train, device) for device in fit]


def obstacle(
    backend: str, model: ModelConfig, train: TrainConfig, device: str | None, capability: tuple[int, int] | None = None
) -> str | None:
    """Why a backend cannot run, None if it can; device None: as far as is known without it."""
    if backend == "causal":
        return "positions would attend across documents, which model.document_mask=true forbids" if model.document_mask else None
    if not model.document_mask:
        return "nothing is to be masked with model.document_mask=false"
    width = model.hidden // model.heads if model.head_dim is None else model.head_dim
    if backend == "varlen":
        if device == "cpu":
            return "its kernel is for CUDA only"
        if capability is not None and capability < (8, 0):
            return f"its kernel needs compute capability 8.0, this device has {capability[0]}.{capability[1]}"
        if train.dtype != "bfloat16":
            return f"its kernel takes bfloat16, not train.dtype={train.dtype}"
        if model.kv_heads != model.heads and versions.numbers("torch") < (2, 12):
            return f"before torch 2.12 it lacks grouped queries (model.kv_heads={model.kv_heads}, model.heads={model.heads})"
        if width % 8 or width > 256:
            return f"its kernel takes heads of a width that is a multiple of 8, up to 256, not {width}"
    if backend == "flex":
        if device == "cpu":
            return "it has no backward pass on CPU"
        if capability is not None and find_spec("triton") is None:
            return "it needs Triton, which is not installed"
        if train.recompute == "selective":
            return "it is compiled, which hides it from train.recompute=selective"
        if width < 16:
            return f"its kernel takes heads of width 16 or more, not {width}"
    return None
