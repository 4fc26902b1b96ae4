"""What a user may have meant: near words, names that other trainers use, and an example of a value of the right type."""

import difflib
import re
from typing import Any

from mtp_dist.config.bounds import BOUNDS
from mtp_dist.config.numbers import plain

SYNONYMS: dict[str, tuple[str, ...]] = {
    "optim.lr": ("learning_rate", "max_lr", "peak_lr", "base_lr"),
    "optim.weight_decay": ("wd",),
    "optim.clip": ("grad_clip", "gradient_clipping", "max_grad_norm", "clip_grad", "clip_grad_norm", "max_norm", "grad_norm"),
    "optim.eps": ("adam_eps", "adam_epsilon", "epsilon"),
    "optim.beta1": ("adam_beta1", "b1"),
    "optim.beta2": ("adam_beta2", "b2"),
    "schedule.kind": ("lr_scheduler", "lr_schedule", "scheduler", "lr_decay_style", "lr_scheduler_type"),
    "schedule.warmup_tokens": ("warmup", "warmup_steps", "warmup_iters", "warmup_ratio", "lr_warmup_iters", "num_warmup_steps"),
    "schedule.min_ratio": ("min_lr", "min_lr_ratio", "final_lr", "lr_min"),
    "train.global_batch": ("batch_size", "global_batch_size", "train_batch_size", "batch", "bs", "gbs"),
    "train.micro_batch": ("micro_batch_size", "per_device_train_batch_size", "per_device_batch_size", "local_batch_size", "mbs",
                          "gradient_accumulation_steps", "grad_accum", "accumulation_steps"),
    "train.sequence_length": ("seq_len", "seq_length", "seqlen", "context", "context_length", "max_seq_len", "max_seq_length",
                              "max_length", "ctx_len", "n_ctx", "block_size", "max_position_embeddings"),
    "train.steps": ("max_steps", "num_steps", "total_steps", "iters", "max_iters", "train_iters", "iterations", "training_steps"),
    "train.tokens": ("max_tokens", "num_tokens", "total_tokens", "train_tokens", "epochs", "num_epochs", "num_train_epochs"),
    "train.dtype": ("precision", "bf16", "fp16", "mixed_precision", "torch_dtype"),
    "train.recompute": ("activation_checkpointing", "gradient_checkpointing", "recompute_activations", "ac"),
    "train.compile": ("torch_compile",),
    "train.log_every_steps": ("log_interval", "log_every", "logging_steps", "log_freq", "log_steps"),
    "parallel.data": ("dp", "dp_size", "data_parallel", "data_parallel_size", "replicas", "ddp"),
    "parallel.tensor": ("tp", "tp_size", "tensor_parallel", "tensor_parallel_size", "model_parallel_size", "mp"),
    "parallel.pipeline": ("pp", "pp_size", "pipeline_parallel", "pipeline_parallel_size", "pipeline_stages", "num_stages"),
    "parallel.sequence_parallel": ("sp",),
    "parallel.interleave": ("virtual_stages", "vpp", "num_virtual_stages"),
    "zero.stage": ("zero_stage", "zero_optimization", "fsdp"),
    "model.layers": ("n_layers", "num_layers", "n_layer", "num_hidden_layers"),
    "model.hidden": ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "width"),
    "model.heads": ("n_heads", "num_heads", "n_head", "num_attention_heads"),
    "model.kv_heads": ("n_kv_heads", "num_kv_heads", "num_key_value_heads", "num_query_groups"),
    "model.mlp": ("intermediate_size", "ffn_hidden_size", "d_ff", "mlp_size"),
    "model.vocab_size": ("vocabulary", "vocab", "n_vocab"),
    "model.tie_embeddings": ("tie_word_embeddings", "tied"),
    "mtp.depth": ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers", "n_predict", "n_future_tokens", "mtp_depth",
                  "num_predict_tokens"),
    "mtp.loss_weight": ("lambda", "mtp_loss_weight", "mtp_loss_scaling_factor", "mtp_weight"),
    "data.path": ("dataset", "data_dir", "data_path", "dataset_path", "train_data"),
    "data.prefetch": ("num_workers", "prefetch_factor"),
    "validation.every_steps": ("eval_every", "eval_steps", "eval_interval", "val_interval", "val_every", "eval_freq",
                               "validation_interval"),
    "validation.sequences": ("eval_iters", "eval_batches", "val_samples"),
    "checkpoint.every_steps": ("save_every", "save_steps", "save_interval", "save_freq", "checkpoint_interval", "ckpt_interval"),
    "checkpoint.keep_last": ("save_total_limit", "keep_latest_k", "max_checkpoints"),
    "init.checkpoint": ("resume_from", "load", "pretrained", "init_from", "warm_start", "finetune_from", "load_path"),
    "tracker.project": ("wandb_project",),
    "tracker.name": ("wandb_name", "run_name", "wandb_run_name"),
    "tracker.entity": ("wandb_entity",),
    "tracker.tags": ("wandb_tags",),
    "run_dir": ("output_dir", "save_dir", "out_dir", "log_dir", "exp_dir", "output", "out"),
    "launch.nodes": ("nnodes", "num_nodes", "n_nodes"),
    "launch.processes_per_node": ("nproc_per_node", "gpus", "ngpus", "num_gpus", "devices", "n_gpus"),
    "launch.device": ("accelerator", "cuda"),
    "launch.time": ("time_limit", "walltime"),
    "decode.max_new_tokens": ("max_tokens", "max_length", "new_tokens", "length", "n_predict"),
    "decode.temperature": ("temp",),
    "decode.top_p": ("nucleus",),
    "decode.draft": ("gamma", "num_speculative_tokens", "speculative_tokens", "num_draft_tokens", "draft_tokens"),
    "decode.drafter": ("speculative", "draft_kind"),
    "decode.draft_model": ("assistant_model", "speculative_model"),
    "decode.batch": ("batch_size", "bs"),
    "decode.stop": ("stop_strings", "stop_words"),
    "checkpoint": ("ckpt", "ckpt_path", "model_path", "load", "run_dir", "model"),
    "prompt": ("text", "input"),
    "out": ("output", "output_dir", "out_dir"),
    "input": ("files", "file", "data", "path"),
    "longest": ("max_model_len", "max_length", "context_length"),
    "sequences": ("eval_iters", "num_sequences", "rows"),
    "micro_batch": ("batch_size", "micro_batch_size"),
}
"""Setting -> what other trainers and servers call it."""
_EXAMPLES = {"mtp.curriculum": "[[0,1],[1e9,2]]", "parallel.costs": "[1,1,1,2,2,2]", "launch.directives": "[--exclusive]"}
_LISTS = {
    "list[int]": "[1,2]",
    "list[float]": "[0.5,1]",
    "list[list[float]]": "[[1e9,0.1],[2e9,0]]",
    "list[list[int]]": "[[0],[1],[0,0]]",
    "list[str]": "[one,two]",
}


def suggestion(word: str, known: list[str]) -> str:
    """``; did you mean X?`` where some known word is near, else nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def key_suggestion(key: str, settings: list[str], groups: list[str]) -> str:
    """``; did you mean X?`` for a setting that does not exist, by what others call it, by its last part, by near spelling, and by
    the words that it is made of; else where all of them are listed. ``groups``: names of groups that may be chosen."""
    found = _meant(key, settings, [*settings, *groups])
    return f"; did you mean {' or '.join(found)}?" if found else "; --help lists them all"


def example(key: str, kind: Any, default: Any) -> str:
    """A value as one would type it: the default where there is one."""
    if key in _EXAMPLES:
        return _EXAMPLES[key]
    if key in BOUNDS and default is None:
        return plain(BOUNDS[key].example or BOUNDS[key].least)
    if kind is bool:
        return "true"
    if default in (None, "", [], {}):
        return _LISTS.get(str(kind), "text")
    return plain(default) if isinstance(default, int | float) else str(default).replace(" ", "")


def _meant(key: str, settings: list[str], known: list[str]) -> list[str]:
    group, _, last = key.lower().replace("-", "_").rpartition(".")

    def at_home(names: list[str]) -> list[str]:
        """Those of the group that was typed, if there are any."""
        return [name for name in names if name.rpartition(".")[0] == group] or names

    joined = key.lower().replace(".", "_")
    by_synonym = [name for name in settings if {last, joined} & set(SYNONYMS.get(name, ()))]
    by_last_part = [name for name in known if name.rpartition(".")[2] == last]
    if found := at_home(by_synonym + by_last_part):
        return found[:3]
    words = {word: name for name in reversed(known) for word in (name.rpartition(".")[2], *SYNONYMS.get(name, ()))}

    def near_word(cutoff: float) -> list[str]:
        return [words[word] for word in difflib.get_close_matches(last, list(words), n=1, cutoff=cutoff)]

    near_key = difflib.get_close_matches(key, settings if "." in key else known, n=1, cutoff=0.6)
    return near_word(0.9) or near_key or near_word(0.75) or _by_words(key, known)


def _by_words(key: str, known: list[str]) -> list[str]:
    """The setting that shares the greatest part of its words with the key, at least half of them."""
    typed = set(_words(key))

    def shared(name: str) -> float:
        named = set(_words(name))
        return len(typed & named) / len(typed | named)

    best = max(known, key=shared, default=None)
    return [best] if best is not None and shared(best) >= 0.5 else []


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[._\-/]+", name.lower()) if word]
