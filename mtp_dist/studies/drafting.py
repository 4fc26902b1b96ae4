"""What a trained variant's heads are worth to a decoder: held-out prompts continued, plainly and with drafts."""

from dataclasses import replace

import torch

from mtp_dist.config.schema import DecodeConfig, Study
from mtp_dist.data.dataset import Dataset
from mtp_dist.data.rows import Rows
from mtp_dist.data.tokenizer import load_tokenizer, vocabulary_size
from mtp_dist.decoding.engine import generate
from mtp_dist.decoding.request import DRAFTING
from mtp_dist.decoding.statistics import Statistics, total
from mtp_dist.model.chunk import Chunk
from mtp_dist.studies.training import Trained


def drafted(trained: Trained, data: Dataset, config: Study) -> dict[str, float]:
    """Prompts are the beginnings of held-out rows, evenly spaced over the split; both ways go prompt by prompt in turn, so that
    what else the machine does meets both. Numbers, none for a model without heads that draft:

    `forward_tokens`: tokens a forward pass of the trunk behind the prompt; `kept_k`: share of drafts of depth k accepted where
    all before it were; `speedup`: tokens a second over the model's own plain decoding; `same`: share of greedy texts equal to
    the plain ones. A ratio without a denominator is left out.
    """
    chunk, task = trained.workload.pipeline.chunks[0], config.text
    assert isinstance(chunk, Chunk)
    if config.mtp.kind not in DRAFTING:
        return {}
    rows = Rows(data, "validation", task.prompt_tokens, 0)
    places = [number * len(rows) // task.prompts for number in range(task.prompts)]
    prompts = [rows.read(place, place + 1).tokens[0, : task.prompt_tokens].tolist() for place in places]
    vocabulary = vocabulary_size(load_tokenizer(data.tokenizer_path))
    plain = DecodeConfig(mode="plain", max_new_tokens=task.new_tokens, stop_at_eos=False, temperature=task.temperature)
    ways = {"plain": plain, "drafts": replace(plain, mode="speculative")}
    for way in ways.values():  # the first pass of a kind is slow
        generate(chunk, prompts[0], way, end=data.eos_id, vocabulary=vocabulary)
    found: dict[str, list[Statistics]] = {name: [] for name in ways}
    same = 0
    for number, prompt in enumerate(prompts):
        texts = []
        for name, way in ways.items():
            chance = torch.Generator(trained.workload.mesh.device).manual_seed(config.seed + number)
            text = generate(chunk, prompt, way, end=data.eos_id, vocabulary=vocabulary, generator=chance)
            found[name].append(text.statistics)
            texts.append(text.tokens)
        same += texts[0] == texts[1]
    values = numbers(total(found["plain"]), total(found["drafts"]))
    return values if task.temperature else values | {"same": same / len(prompts)}


def numbers(plain: Statistics, drafts: Statistics) -> dict[str, float]:
    """Those of ``drafted`` that statistics tell."""
    values = {"forward_tokens": drafts.tokens_per_forward}
    values |= {f"kept_{k}": share for k, share in enumerate(drafts.conditional_acceptance, start=1)}
    if plain.tokens_per_second and drafts.tokens_per_second:
        values["speedup"] = drafts.tokens_per_second / plain.tokens_per_second
    return {name: value for name, value in values.items() if value is not None}
