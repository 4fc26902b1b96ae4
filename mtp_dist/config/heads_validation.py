"""The rules of the MTP heads and of how their losses join the main one. Pure, as ``validation``, which calls them."""

from mtp_dist.config.heads import (
    KINDS,
    OWN_EMBEDDING,
    OWN_PROJECTION,
    SAMPLED,
    detaches,
    learns_inside,
    lookahead,
    one_module,
)
from mtp_dist.config.rules import alternatives, between, one_of
from mtp_dist.config.schema import ModelConfig, MTPConfig
from mtp_dist.errors import UserError
from mtp_dist.quantity import counted


def validate_mtp(mtp: MTPConfig, model: ModelConfig, vocabulary: int | None, sequence_length: int) -> None:
    """Raise UserError at the first rule that the heads break. ``vocabulary``: entries of it, None while not known."""
    _validate_kind(mtp, sequence_length)
    _validate_main_loss(mtp)
    _validate_scheduled_sampling(mtp)
    _validate_taps(mtp, model)
    _validate_draft_vocabulary(mtp, vocabulary)


def _validate_kind(mtp: MTPConfig, sequence_length: int) -> None:
    one_of("mtp.kind", mtp.kind, KINDS)
    one_of("mtp.concat", mtp.concat, ["embedding_first", "hidden_first"])
    one_of("mtp.h0", mtp.h0, ["post_norm", "pre_norm"])
    one_of("mtp.recycle", mtp.recycle, ["post_norm", "pre_norm"])
    one_of("mtp.branch", mtp.branch, ["penultimate", "final"])
    one_of("mtp.targets", mtp.targets, ["tokens", "trunk"])
    for name, kinds in (("projection", OWN_PROJECTION), ("embedding", OWN_EMBEDDING)):
        one_of(f"mtp.{name}", getattr(mtp, name), ["shared", "own"])
        if getattr(mtp, name) == "own" and mtp.kind not in kinds:
            raise UserError(f"mtp.{name}=own is for mtp.kind={alternatives(kinds)}, not {mtp.kind}; choose mtp.{name}=shared")
    for key, has, needed in (("targets", mtp.targets, "trunk"), ("projection", mtp.projection, "shared")):
        if mtp.adversarial and has != needed:
            raise UserError(
                f"mtp.adversarial={mtp.adversarial:g} holds the heads' states against the trunk's, which do not stand for "
                f"the same with mtp.{key}={has}; choose mtp.{key}={needed}, or mtp.adversarial=0"
            )
    if mtp.adversarial and mtp.kind == "none":
        raise UserError(f"mtp.adversarial={mtp.adversarial:g} with mtp.kind=none has no heads to tell; choose mtp.adversarial=0")
    if mtp.repeat and one_module(mtp):
        raise UserError(f"mtp.repeat=true: the module of mtp.kind={mtp.kind} serves every depth anyway; choose mtp.repeat=false")
    if mtp.kind == "eagle3" and mtp.blocks > 1:
        raise UserError(f"mtp.blocks={mtp.blocks}: mtp.kind=eagle3 is one layer; choose mtp.blocks=1, or mtp.kind=eagle")
    if mtp.repeat and mtp.kind not in ("none", "sequential", "notebook"):
        raise UserError(f"mtp.repeat=true with mtp.kind={mtp.kind} would make all depths equal; choose mtp.repeat=false")
    one_of("mtp.normalize", mtp.normalize, ["mean", "sum", "weights"])
    one_of("mtp.loss_weight_shape", mtp.loss_weight_shape, ["step", "linear"])
    if mtp.kind == "none" and mtp.depth != 0:
        raise UserError(f"mtp.depth={mtp.depth} with mtp.kind=none; choose mtp.depth=0 (mtp=none does) or mtp.kind=sequential")
    if mtp.kind != "none" and mtp.depth < 1:
        raise UserError(f"mtp.depth={mtp.depth} with mtp.kind={mtp.kind} must be at least 1; mtp=none trains without MTP heads")
    if lookahead(mtp) >= sequence_length:
        shown = f"mtp.depth={mtp.depth}" + (f" x mtp.stride={mtp.stride}" if mtp.stride > 1 else "")
        if mtp.kind == "top":
            shown = f"mtp.window={mtp.window} - 1"
        raise UserError(f"{shown} must be less than train.sequence_length={sequence_length}")
    _validate_order(mtp)
    if mtp.stride > 1 and (one_module(mtp) or learns_inside(mtp)):
        raise UserError(
            f"mtp.stride={mtp.stride} with mtp.kind={mtp.kind} and mtp.targets={mtp.targets}, which follow the trunk position by "
            "position; choose mtp.stride=1"
        )
    if mtp.freeze_trunk and mtp.depth == 0:
        raise UserError("mtp.freeze_trunk=true with mtp.depth=0 leaves nothing to train; choose mtp.freeze_trunk=false")
    if mtp.depth_weights and len(mtp.depth_weights) != mtp.depth:
        entries = counted(len(mtp.depth_weights), "entry", "entries")
        raise UserError(f"mtp.depth_weights has {entries}, but mtp.depth={mtp.depth}; empty: by mtp.decay")
    if mtp.depth_weights and mtp.decay != 1:
        raise UserError(f"mtp.decay={mtp.decay:g} and mtp.depth_weights={mtp.depth_weights} say the same thing twice; choose one")
    if mtp.normalize == "weights" and mtp.depth_weights and not sum(mtp.depth_weights):
        raise UserError("mtp.normalize=weights divides by the sum of mtp.depth_weights, 0; choose mtp.normalize=mean or sum")
    _validate_points("loss_weight_points", mtp.loss_weight_points, "lambda")
    _validate_curriculum(mtp)


def _validate_order(mtp: MTPConfig) -> None:
    for name, needed in (("depth", 1), ("stride", 1), ("blocks", 1), ("targets", "tokens")):
        if mtp.kind == "top" and (has := getattr(mtp, name)) != needed:
            raise UserError(f"mtp.{name}={has}: mtp.kind=top is one matrix that ranks mtp.window tokens; choose {needed}")


def _validate_taps(mtp: MTPConfig, model: ModelConfig) -> None:
    if not mtp.taps:
        return
    if mtp.kind != "eagle3":
        raise UserError(f"mtp.taps={mtp.taps} are for mtp.kind=eagle3, not {mtp.kind}; choose mtp.taps=[]")
    for layer in mtp.taps:
        if not 0 <= layer <= model.layers:
            raise UserError(
                f"mtp.taps={mtp.taps}: {layer} is no state of a trunk of model.layers={model.layers}; choose from 0 (embeddings) "
                f"to {model.layers} (its output), or [] for the default"
            )
    if sorted(set(mtp.taps)) != mtp.taps:
        raise UserError(f"mtp.taps={mtp.taps} must ascend; choose mtp.taps={sorted(set(mtp.taps))}")


def _validate_draft_vocabulary(mtp: MTPConfig, vocabulary: int | None) -> None:
    if mtp.draft_vocabulary is None:
        return
    shown = f"mtp.draft_vocabulary={mtp.draft_vocabulary}"
    if not one_module(mtp):
        raise UserError(f"{shown} is for mtp.kind=eagle and eagle3, not {mtp.kind}; choose mtp.draft_vocabulary=null")
    if vocabulary is not None and mtp.draft_vocabulary > vocabulary:
        tokens = counted(vocabulary, "token")
        raise UserError(f"{shown} is more than the {tokens} of the vocabulary; choose {vocabulary} or fewer, or null")


def _validate_points(name: str, points: list[list[float]], meaning: str) -> None:
    """[tokens trained, value] pairs, ascending."""
    last = 0.0
    for point in points:
        if len(point) != 2:
            raise UserError(f"mtp.{name}: {point} is not a pair [tokens seen, {meaning}]")
        tokens = point[0]
        if not tokens > last:
            raise UserError(f"mtp.{name}: {tokens:g} tokens after {last:g}; the tokens must ascend from above 0")
        last = tokens


def _validate_main_loss(mtp: MTPConfig) -> None:
    _validate_points("main_loss_weight_points", mtp.main_loss_weight_points, "lambda_0")
    shown = f"mtp.main_loss_weight={mtp.main_loss_weight:g}"
    if mtp.main_loss_weight_points:
        shown += f" and mtp.main_loss_weight_points={mtp.main_loss_weight_points}"
    elif mtp.main_loss_weight == 1:
        return
    if mtp.freeze_trunk:
        raise UserError(
            f"{shown}: with mtp.freeze_trunk=true nothing learns from the main loss; choose mtp.main_loss_weight=1 without points"
        )
    if not any((mtp.main_loss_weight, *(later for _, later in mtp.main_loss_weight_points))):
        if mtp.kind == "none":
            raise UserError(f"{shown} with mtp.kind=none leaves no loss at all; choose mtp.main_loss_weight=1")
        if detaches(mtp):
            raise UserError(
                f"{shown}: no other loss reaches the trunk (mtp.kind={mtp.kind}, mtp.detach={str(mtp.detach).lower()}), which "
                "would stay random; choose mtp.main_loss_weight=1, or mtp.freeze_trunk=true with init.checkpoint"
            )


def _validate_scheduled_sampling(mtp: MTPConfig) -> None:
    one_of("mtp.scheduled_sampling_shape", mtp.scheduled_sampling_shape, ["step", "linear"])
    _validate_points("scheduled_sampling_points", mtp.scheduled_sampling_points, "probability")
    for _, later in mtp.scheduled_sampling_points:
        between("mtp.scheduled_sampling_points", later, 0, 1)
    shown = f"mtp.scheduled_sampling={mtp.scheduled_sampling:g}"
    if mtp.scheduled_sampling_points:
        shown = f"mtp.scheduled_sampling_points={mtp.scheduled_sampling_points}"
    elif mtp.scheduled_sampling_shape != "step":
        raise UserError(
            f"mtp.scheduled_sampling_shape={mtp.scheduled_sampling_shape} without mtp.scheduled_sampling_points has nothing to "
            "shape; give points as [[1000000,0.5]], or choose step"
        )
    elif not mtp.scheduled_sampling:
        return
    if mtp.kind not in SAMPLED:
        raise UserError(
            f"{shown} is for mtp.kind={alternatives(SAMPLED)}, not {mtp.kind}; choose mtp.scheduled_sampling=0 without points"
        )


def _validate_curriculum(mtp: MTPConfig) -> None:
    least, last = int(mtp.freeze_trunk), -1.0
    if mtp.curriculum and mtp.kind == "none":
        raise UserError("mtp.curriculum with mtp.kind=none has no depths to choose from; choose mtp.curriculum=[]")
    for point in mtp.curriculum:
        if len(point) != 2:
            raise UserError(f"mtp.curriculum: {point} is not a pair [tokens seen, depth]")
        tokens, depth = point
        if not tokens > last:
            raise UserError(f"mtp.curriculum: {tokens:g} tokens after {last:g}; the tokens must ascend")
        if depth not in range(least, mtp.depth + 1):
            reason = " (mtp.freeze_trunk=true leaves nothing else to train)" if least and not depth else ""
            allowed = f"a whole number from {least} to mtp.depth={mtp.depth}"
            raise UserError(f"mtp.curriculum: depth {depth:g} is not {allowed}{reason}")
        last = tokens
