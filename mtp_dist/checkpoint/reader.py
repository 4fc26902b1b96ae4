"""Reading: any slice of any parameter from the fragments of any layout, memory-mapped; a whole model for one process, or a rank's
part.

No rank reads more than the slices that it needs, and the boxes (tensor-parallel slices of the layout that saved) that they touch.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mtp_dist.checkpoint import folder as folders
from mtp_dist.checkpoint.draft_tokens import of_checkpoint
from mtp_dist.checkpoint.manifest import (
    TOKENIZER,
    DamagedError,
    FragmentRecord,
    Manifest,
    OptimizerRecord,
    damage,
    damaged,
    read_manifest,
)
from mtp_dist.checkpoint.settings import load_settings
from mtp_dist.config.schema import ParallelConfig, TrainingRun
from mtp_dist.errors import UserError
from mtp_dist.json_document import FormError, typed
from mtp_dist.member_file import open_member
from mtp_dist.model.chunk import Chunk
from mtp_dist.model.parameter import replace, spec_of
from mtp_dist.parallel.engine import PARTS, Engine
from mtp_dist.parallel.mesh import Mesh
from mtp_dist.parallel.parameter_groups import HEADS, TRUNK, role_of
from mtp_dist.parallel.stages import build_chunks
from mtp_dist.tensor_header import StoredTensor, read_header

T = TypeVar("T")


def _every(name: str) -> bool:
    return True


class Checkpoint:
    """One complete checkpoint, opened for reading."""

    def __init__(self, path: Path) -> None:
        """Raises UserError where `path` is none."""
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        self._open: dict[str, Any] = {}
        self._headers: dict[str, dict[str, StoredTensor]] = {}

    @property
    def step(self) -> int:
        return self.manifest.step

    @cached_property
    def config(self) -> TrainingRun:
        """The settings of the run that saved it."""
        return load_settings(self.path, self.manifest)

    def section(self, name: str, kind: type[T]) -> T:
        """A section of the manifest with the fields that a dataclass has. Raises DamagedError where it has others."""
        try:
            return typed(getattr(self.manifest, name), kind, name)
        except FormError as error:
            raise damaged(self.path, str(error)) from None

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER

    @cached_property
    def draft_tokens(self) -> list[int] | None:
        """Those among which its heads draft; None: all. Raises UserError."""
        return of_checkpoint(self.path, self.config)

    def damages(self, share: int = 0, shares: int = 1) -> list[str]:
        """What is wrong with its files, by size and SHA-256; every `shares`-th file from number `share` on."""
        files = sorted(self.manifest.files.items())[share::shares]
        return [problem for name, record in files if (problem := damage(self.path, name, record))]

    def _tensor(self, file: str, key: str, dtype: str, count: int | None = None) -> Tensor:
        """A one-dimensional tensor of a file, of just this dtype (as safetensors names it) and number of elements (None: any).
        Raises DamagedError where the file holds another one, or cannot be read."""
        try:
            if file not in self._open:
                with open_member(self.path, file) as raw:  # safetensors opens whatever lies there
                    self._headers[file] = read_header(raw)
                    self._open[file] = safe_open(self.path / file, framework="pt")
            stored = self._headers[file].get(key)
            if stored is None:
                raise FormError(f"it does not hold {key[:80]}")
            if stored.dtype != dtype or len(stored.shape) != 1 or (count is not None and stored.shape != [count]):
                expected = f"{dtype} [{'N' if count is None else count}]"
                raise FormError(f"it holds {key[:80]} as {stored.dtype} {stored.shape}; expected {expected}")
            tensor: Tensor = self._open[file].get_tensor(key)
        except (OSError, FormError, SafetensorError) as error:
            raise DamagedError(f"{self.path / file} cannot be read ({str(error)[:200]}); use another checkpoint") from None
        return tensor

    def _require_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise UserError where a parameter of the model has another shape here."""
        record = self.manifest.parameters.get(name)
        if record is not None and record.shape != list(shape):
            raise UserError(
                f"checkpoint {self.path} has {name} of shape {record.shape}, the model of shape {list(shape)}: it belongs to a "
                "different model"
            )

    def read(self, name: str, part: str, start: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None) -> Tensor:
        """float32 values of the box `start` .. `start + shape` of a parameter (None: all of it), of one of ``PARTS``. A
        parameter that was saved frozen has zero moments."""
        record = self.manifest.parameters.get(name)
        if record is None:
            raise UserError(f"checkpoint {self.path} has no parameter {name}: it belongs to a different model")
        if shape is not None and any(a + n > whole for a, n, whole in zip(start or (), shape, record.shape, strict=True)):
            raise UserError(f"checkpoint {self.path} has {name} of shape {record.shape}: it belongs to a different model")
        shape = tuple(record.shape) if shape is None else shape
        start = (0,) * len(shape) if start is None else start
        if part != PARTS[0] and not record.moments:
            return torch.zeros(shape)
        wanted = torch.empty(shape)
        filled = 0
        for (box_start, box_shape), members in record.boxes().items():
            low = [max(a, b) for a, b in zip(start, box_start, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, shape, box_start, box_shape, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            box = self._box(name, part, box_shape, members)
            inside = box[tuple(slice(a - b, c - b) for a, c, b in zip(low, high, box_start, strict=True))]
            wanted[tuple(slice(a - b, c - b) for a, c, b in zip(low, high, start, strict=True))] = inside
            filled += inside.numel()
        if filled != wanted.numel():
            raise UserError(
                f"checkpoint {self.path} holds {filled} of {wanted.numel()} values of {name}: its manifest is damaged"
            )
        return wanted

    def _box(self, name: str, part: str, shape: tuple[int, ...], fragments: list[FragmentRecord]) -> Tensor:
        flat, position = torch.empty(math.prod(shape)), 0
        for fragment in fragments:
            if fragment.begin != position:
                raise UserError(f"checkpoint {self.path} lacks values {position} to {fragment.begin} of a slice of {name}")
            count = fragment.end - fragment.begin
            flat[fragment.begin : fragment.end] = self._tensor(fragment.file, f"{fragment.key}.{part}", "F32", count)
            position = fragment.end
        if position != flat.numel():
            raise UserError(f"checkpoint {self.path} lacks values {position} to {flat.numel()} of a slice of {name}")
        return flat.view(shape)

    def load_weights(self, chunks: Iterable[nn.Module], dtype: torch.dtype) -> None:
        """Give chunks built on the meta device this checkpoint's weights, each rank its own slices."""
        for chunk in chunks:
            for name, p in list(chunk.named_parameters()):
                if p.is_meta:  # a shared embedding is loaded with its first chunk
                    spec = spec_of(p)
                    self._require_shape(name, spec.shape)
                    replace(chunk, name, self.read(name, PARTS[0], spec.start, spec.local_shape).to(dtype))

    def load_model(self, dtype: torch.dtype = torch.float32) -> Chunk:
        """The whole model in this process, in evaluation mode."""
        with torch.device("meta"):
            layers = range(self.config.model.layers)
            model = Chunk(self.config.model, self.config.mtp, layers, draft_tokens=self.draft_tokens)
        self.load_weights([model], dtype)
        return model.eval().requires_grad_(False)

    def load_part(self, parallel: ParallelConfig, mesh: Mesh, dtype: torch.dtype) -> nn.ModuleList:
        """This rank's chunks of the model under a layout, ascending, in evaluation mode on the mesh's device."""
        chunks = build_chunks(dataclasses.replace(self.config, parallel=parallel), mesh, self.draft_tokens)
        self.load_weights(chunks, dtype)
        return chunks.eval().requires_grad_(False).to(mesh.device)

    def load_engine(
        self, engine: Engine, *, weights: Callable[[str], bool] = _every, moments: Collection[str] = (TRUNK, HEADS)
    ) -> None:
        """Weights and masters of this rank's part, whatever layout saved them, of the parameters that `weights` takes by name;
        moments, and Adam's count of steps, of the roles in `moments`. The others stay as they are, but for one that stands for
        a parameter which is loaded (``ParameterSpec.stands_for``): it starts as a copy."""
        owned = {fragment.name: fragment for fragment in engine.fragments(all_copies=True)}
        for name, p in engine.parameters.items():
            spec = spec_of(p)
            source = name if weights(name) else spec.stands_for
            if source is None:
                continue
            self._require_shape(source, spec.shape)
            master = self.read(source, PARTS[0], spec.start, spec.local_shape)
            engine.set_weight(name, master)
            fragment = owned.get(name)
            if fragment is None:
                continue
            for part, values in fragment.parts.items():
                if part == PARTS[0] or (source == name and role_of(name) in moments):
                    whole = master if part == PARTS[0] else self.read(name, part, spec.start, spec.local_shape)
                    values.copy_(whole.flatten()[fragment.begin : fragment.end])
        applied = self.section("optimizer", OptimizerRecord)
        steps = applied.steps or dict.fromkeys((TRUNK, HEADS), applied.step)
        if steps.keys() != {TRUNK, HEADS}:
            raise damaged(self.path, f"optimizer.steps is of {sorted(steps)}")
        engine.optimizer_steps = {role: count if role in moments else 0 for role, count in steps.items()}

    def load_random_state(self, rank: int, device: torch.device) -> None:
        """This rank's random generators, where the layout that saved had such a rank."""
        file = f"rank_{rank:05d}.safetensors"
        if file not in self.manifest.files:
            return
        state = self._tensor(file, "rng.cpu", "U8")
        try:
            torch.set_rng_state(state)
            if device.type == "cuda" and "rng.cuda" in self._headers[file]:
                torch.cuda.set_rng_state(self._tensor(file, "rng.cuda", "U8"), device)
        except RuntimeError as error:
            raise DamagedError(f"{self.path / file} holds no state of a random generator ({str(error)[:80]})") from None


def open_checkpoint(path: str | Path, setting: str = "checkpoint") -> Checkpoint:
    """The checkpoint that a user's path names (of a run folder: the newest that verifies), checked against its checksums.

    Raises UserError where there is none that is sound.
    """
    return Checkpoint(folders.sound(path, setting))
