"""A trained model in Hugging Face's terms: Llama's names for the trunk, DeepSeek-V3's for the MTP modules. Pure functions.

A block of ours is Llama's block, half-split rotary pairs included, so no row moves. MTP module k = 1 .. D takes the layer number
L + k - 1 behind the trunk's L layers, as in the released DeepSeek-V3 weights; its input has the embedding's half first there, so
a projection trained hidden-first has its halves exchanged. Sources: `transformers` 5.23 (`LlamaForCausalLM`, `MtpModel`),
arXiv 2412.19437.
"""

from dataclasses import dataclass
from typing import Any

from mtp_dist.config.schema import ModelConfig, MTPConfig, TrainingRun
from mtp_dist.errors import UserError

_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_MODULE = {"embedding_norm": "enorm", "hidden_norm": "hnorm", "projection": "eh_proj", "norm": "shared_head.norm"}


@dataclass(frozen=True)
class Renamed:
    """Parameter `source` of ours under its new `name`; `exchange`: its two halves along dimension 1 change places."""

    name: str
    source: str
    exchange: bool = False


def require_expressible(model: ModelConfig, mtp: MTPConfig) -> None:
    """Raise UserError for what `transformers` would read as another model. Give a depth of 0 for a trunk without heads."""
    if model.hidden % model.heads:
        raise UserError(
            f"the checkpoint's model.hidden={model.hidden} is not a multiple of model.heads={model.heads}, which format=hf "
            "cannot hold: transformers' Llama refuses it; train with a model.heads that divides model.hidden to export"
        )
    if mtp.depth and (mtp.kind != "sequential" or mtp.blocks > 1 or mtp.repeat):
        raise UserError(
            f"the checkpoint's heads (mtp.kind={mtp.kind}, mtp.blocks={mtp.blocks}, mtp.repeat={str(mtp.repeat).lower()}) are "
            "none that format=hf can hold: it takes sequential modules of one block; choose heads=false to export the trunk alone"
        )
    for key in ("embedding", "projection"):
        if mtp.depth and getattr(mtp, key) == "own":
            raise UserError(
                f"the checkpoint's heads have mtp.{key}=own, but readers of format=hf share the trunk's with the heads; choose "
                "heads=false to export the trunk alone"
            )
    if mtp.depth and mtp.stride > 1:
        raise UserError(
            f"the checkpoint's heads have mtp.stride={mtp.stride}, but readers of format=hf take depth k for the token k beyond "
            "the next one; choose heads=false to export the trunk alone"
        )
    for key in ("h0", "recycle"):
        if mtp.depth and getattr(mtp, key) != "post_norm":
            raise UserError(
                f"the checkpoint's mtp.{key}={getattr(mtp, key)}, but readers of format=hf pass states on after their norm; "
                "choose heads=false to export the trunk alone"
            )


def renamed(model: ModelConfig, mtp: MTPConfig) -> list[Renamed]:
    """Every tensor of the export, in the order of the forward pass. A tied output head is not written twice."""
    found = [Renamed("model.embed_tokens.weight", "embedding.weight")]
    for layer in range(model.layers):
        found += _block(f"layers.{layer}", f"model.layers.{layer}")
    found.append(Renamed("model.norm.weight", "norm.weight"))
    if not model.tie_embeddings:
        found.append(Renamed("lm_head.weight", "head.weight"))
    for k in range(1, mtp.depth + 1):
        here, there = f"mtp.{k}", f"model.layers.{model.layers + k - 1}"
        for ours, theirs in _MODULE.items():
            exchange = ours == "projection" and mtp.concat == "hidden_first"
            found.append(Renamed(f"{there}.{theirs}.weight", f"{here}.{ours}.weight", exchange))
        found += _block(f"{here}.block", there)
    return found


def _block(here: str, there: str) -> list[Renamed]:
    return [Renamed(f"{there}.{theirs}.weight", f"{here}.{ours}.weight") for ours, theirs in _BLOCK.items()]


def model_config(run: TrainingRun, mtp: MTPConfig, dtype: str, eos_id: int) -> dict[str, Any]:
    """config.json. `num_mtp_layers` is the name in transformers, `num_nextn_predict_layers` in DeepSeek-V3's own files."""
    model = run.model
    content: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden,
        "intermediate_size": model.mlp,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": run.train.sequence_length,
        "rms_norm_eps": model.norm_eps,
        # transformers 5 reads the first, earlier versions and other readers the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "attention_bias": False,
        "mlp_bias": False,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if mtp.depth:
        content |= {"num_mtp_layers": mtp.depth, "num_nextn_predict_layers": mtp.depth}
    return content


def generation_config(vocabulary: int, rows: int, eos_id: int) -> dict[str, Any]:
    """generation_config.json: rows that pad the embedding beyond the tokenizer's `vocabulary` are never drawn."""
    content: dict[str, Any] = {"do_sample": False, "eos_token_id": eos_id, "pad_token_id": eos_id}
    if rows > vocabulary:
        content["suppress_tokens"] = list(range(vocabulary, rows))
    return content


def tokenizer_config(eos_token: str, length: int) -> dict[str, Any]:
    """tokenizer_config.json: which token ends a document, and that text which spells it is text, as in training and `generate`;
    tokenizer.json says everything else."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "pad_token": eos_token,
        "model_max_length": length,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
