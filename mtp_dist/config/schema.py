"""Every setting of the project: its type, its default and what it means, in one place.

One dataclass for each group of ``conf/``; the root classes (``TrainingRun``, ``Generation``, ``Evaluation``, ``Export``,
``Inspection``, ``Serving``, ``ShardBuild``, ``Report``, ``Plan``, ``Study``) name the groups that an entry point takes. ``docs/configuration.md`` is generated from this file,
``validation.py`` holds the rules that need more than one field.
"""

from dataclasses import MISSING, dataclass, field
from typing import Any


def setting(default: Any, text: str, **metadata: Any) -> Any:
    """A dataclass field that carries its own documentation; lists and dicts get a fresh copy an instance.

    ``absent=VALUE``: what a file saved before the setting existed means, where that is not the default. ``escapes=True``: on the
    command line, a backslash in its text begins an escape (see ``config/escapes.py``).
    """
    metadata = {"text": text, **metadata}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


def group(cls: type, text: str) -> Any:
    """A nested group of settings."""
    return field(default_factory=cls, metadata={"text": text})


@dataclass
class ModelConfig:
    """The trunk: a Llama-style decoder (RMSNorm, RoPE, grouped-query attention, SwiGLU)."""

    vocab_size: int | None = setting(None, "Rows of the embedding. null: the vocabulary of the dataset's tokenizer.")
    vocab_multiple: int = setting(1, "vocab_size=null: the tokenizer's vocabulary rounded up to a multiple of this (128 suits tensor cores). The added rows are never a target, and never drawn.")
    layers: int = setting(6, "Blocks of the trunk; the MTP modules are extra.")
    hidden: int = setting(256, "Width of the residual stream.")
    heads: int = setting(8, "Query heads.")
    kv_heads: int = setting(4, "Key/value heads (grouped-query attention); divides `heads`.")
    head_dim: int | None = setting(None, "Width of one head. null: hidden / heads.")
    mlp: int = setting(704, "Inner width of the SwiGLU feed-forward layer.")
    norm_eps: float = setting(1e-5, "Epsilon of every RMSNorm, inside the root.")
    rope_theta: float = setting(10000.0, "Base of the rotary position embedding.")
    tie_embeddings: bool = setting(True, "The output head is the embedding matrix; false: a matrix of its own.")
    init_std: float = setting(0.02, "Standard deviation of initial weights; output projections of blocks are scaled by 1/sqrt(2 layers).")
    document_mask: bool = setting(True, "Attention never crosses from one document into another of the same row.")


@dataclass
class MTPConfig:
    """The Multi-Token Prediction heads, and how their losses join the main one.

    `concat`, `h0`, `recycle`, `repeat`, `blocks`, `branch`, `projection`, `embedding`, `draft_vocabulary`, `taps` and `stride` are the contract: recorded in every checkpoint, a wrong choice shows only as lower acceptance.
    """

    kind: str = setting("sequential", "none | sequential (DeepSeek-V3, arXiv 2412.19437 eq. 21-25) | parallel (Gloeckle, 2404.19737) | medusa (2401.10774) | eagle (2401.15077) | eagle3 (2503.01840) | notebook (position by position, as an explanatory notebook has it) | top (2508.19228: a second output matrix ranks the upcoming tokens; an auxiliary loss that drafts nothing).")
    depth: int = setting(2, "D: how many tokens beyond the next one are predicted.")
    stride: int = setting(1, "s: depth k at position i predicts t[i+1+k s] (leap targets, arXiv 2505.17505), and a kind that reads tokens is fed t[i+1+(k-1) s], the target of depth k-1. Above 1 for training only: there is no drafter and no export.")
    concat: str = setting("embedding_first", "sequential, eagle, eagle3: order in the input of W_k: embedding_first (released weights) | hidden_first (the paper's formula).")
    h0: str = setting("post_norm", "Trunk state given to depth 1 (eagle: and to be drawn at all): post_norm (after the final norm) | pre_norm.")
    recycle: str = setting("post_norm", "sequential: state of depth k given to depth k+1: post_norm (after norm_k) | pre_norm.")
    targets: str = setting("tokens", "What depth k learns at position i: tokens (t[i+k+1]) | trunk (self-distillation: the distribution that the trunk's own head gives at position i+k, which gets no gradient from it; the last k positions of a row have none). Accuracies then tell whether both name the same likeliest token.")
    main_loss_weight: float = setting(1.0, "Lambda_0, the weight of the main loss from the first token on. 0: trunk and heads learn from the MTP losses alone.")
    main_loss_weight_points: list[list[float]] = setting([], "Later values of lambda_0 as [tokens trained, value] pairs, ascending.")
    loss_weight: float = setting(0.3, "Lambda, the weight of the MTP losses from the first token on.")
    loss_weight_points: list[list[float]] = setting([], "Later values of lambda as [tokens trained, value] pairs, ascending.")
    loss_weight_shape: str = setting("step", "How lambda and lambda_0 go from point to point: step (each value holds from its point on) | linear (a straight line from one to the next, the last one holds).")
    scheduled_sampling: float = setting(0.0, "sequential, notebook: probability that depth k at a position is fed the model's own prediction instead of the true token: what depth k-1 names likeliest at that position (depth 1: the main head), as a greedy draft is. Drawn for each position and depth (arXiv 1506.03099). Validation always feeds the true tokens. 0: never, at no cost; 1: always.")
    scheduled_sampling_points: list[list[float]] = setting([], "Later values of scheduled_sampling as [tokens trained, probability] pairs, ascending.")
    scheduled_sampling_shape: str = setting("step", "How scheduled_sampling goes from point to point: step | linear.")
    normalize: str = setting("mean", "mean: lambda / D * sum_k w_k L_k | sum: lambda * sum_k w_k L_k | weights: lambda * sum_k w_k L_k / sum_k w_k.")
    depth_weights: list[float] = setting([], "w_1 .. w_D. Empty: `decay`.")
    decay: float = setting(1.0, "Beta: w_k = beta^(k-1), where `depth_weights` is empty.")
    curriculum: list[list[float]] = setting([], "Depths in force as [tokens trained, depth] pairs, ascending; before the first, all D. Forward: [[0,1],[1e9,2]]; reverse: [[1e9,1]]. A deeper one has no loss, is not computed (ZeRO-2 and 3 compute it with weight 0), and its module gets zero gradients. D in `normalize` is the depth in force.")
    repeat: bool = setting(False, "sequential, notebook: one module serves every depth (FastMTP, arXiv 2509.18362).")
    blocks: int = setting(1, "K: decoder blocks of each module; medusa: residual blocks; notebook: its layers.")
    branch: str = setting("penultimate", "parallel: the trunk state that the heads read: penultimate (it enters the last block, which is then the main head's own) | final (the trunk's output).")
    projection: str = setting("shared", "medusa, sequential, notebook: shared (all depths use the main head's matrix) | own (each module has an output matrix of its own; medusa: a copy of the main head's at the start, else random; either way a copy where init.checkpoint lacks it).")
    embedding: str = setting("shared", "sequential, notebook: shared (modules read the trunk's embedding) | own (each module has an embedding of its own, random at the start, a copy of the trunk's where init.checkpoint lacks it).")
    adversarial: float = setting(0.0, "Weight of an adversarial term (KOALA, arXiv 2408.08146, from its abstract alone): a small discriminator tells the trunk's states from the heads', which learn to be taken for them. Needs targets=trunk and projection=shared. 0: none.")
    match_parameters: bool = setting(False, "parallel: as many blocks as the heads have are taken out of the trunk. Resolved settings show the smaller model.layers, and false here.")
    draft_vocabulary: int | None = setting(None, "eagle, eagle3: the depths draft among the so many most frequent tokens of the training split only (EAGLE-3; FR-Spec, arXiv 2502.14856); the projection of a draft then costs that share of the vocabulary. Chosen when a run starts, kept in its folder and its checkpoints. Another target has no loss and counts as wrong. null: all.")
    window: int = setting(16, "top: so many upcoming tokens are ranked. The j-th has a share of about e^-j, so more than 16 change nothing.")
    taps: list[int] = setting([], "eagle3: trunk states that it joins, ascending: i enters layer i, model.layers is the output before the final norm. Empty: 2, layers / 2 and layers - 3 as in the released code, or the ends of thirds of fewer than 7 layers.")
    cross_entropy_weight: float = setting(0.1, "eagle: weight of the cross-entropy in L_k, beside the SmoothL1 distance from the trunk's states, which has 1.")
    detach: bool = setting(False, "The MTP losses train the MTP modules only: no gradient of theirs reaches trunk, embedding or output head, which learn from the main loss. eagle: always so.")
    freeze_trunk: bool = setting(False, "Only the MTP modules learn; trunk, embedding and output head keep their weights bit for bit.")


@dataclass
class ParallelConfig:
    """The layout. World size = pipeline x data x tensor; tensor ranks are neighbours, pipeline ranks farthest apart."""

    pipeline: int = setting(1, "PP: pipeline ranks.")
    tensor: int = setting(1, "TP: ranks that split every matrix. Divides model.heads and model.mlp; divides model.kv_heads or is a multiple of it: then each key/value head is held by tensor / kv_heads neighbouring ranks.")
    data: int = setting(1, "DP: replicas; the optimizer is sharded over them by ZeRO.")
    sequence_parallel: bool = setting(False, "Tensor ranks share the positions, too, outside the split matrices: less activation memory. `tensor` must divide train.sequence_length.")
    schedule: str = setting("zbv", "Pipeline schedule: 1f1b (one chunk a rank) | interleaved (several), both with an embedding replica; zbv (zero-bubble V) | dualpipev (DualPipe V).")
    interleave: int = setting(2, "schedule=interleaved: chunks on each rank.")
    placement: str = setting("balanced", "Trunk layers of each chunk: balanced (heads and projections counted) | uniform | a list, first to last, as [3,2,2,1].")
    costs: list[float] = setting([], "Measured seconds (any unit) for placement=balanced: forward, backward, weight gradient of one block, then of what follows the last block. `plan measure=true` prints them. Empty: by floating-point operations.")
    timeout_minutes: float = setting(10.0, "A collective that waits longer than this ends the job.")


@dataclass
class ZeroConfig:
    """DeepSpeed ZeRO."""

    stage: int = setting(1, "0: replicated optimizer | 1: optimizer sharded over replicas | 2: gradients too | 3: weights too; 2 and 3 without a pipeline.")
    offload: bool = setting(False, "Keep the optimizer (float32 weights, moments) in the host's memory and step there.")
    reduce_bucket_size: int = setting(50_000_000, "Elements reduced in one collective.")
    allgather_bucket_size: int = setting(50_000_000, "Elements gathered in one collective.")


@dataclass
class DataConfig:
    """Which shards are read and in which order."""

    path: str = setting("", "Folder made by data/build_shards.py (it holds dataset.json).")
    lanes: int = setting(8, "Logical streams, fixed for a run whatever its layout: divides train.global_batch, is a multiple of parallel.data.")
    block_samples: int = setting(256, "Consecutive documents of a block: one contiguous read, shuffled.")
    mix_tokens: int = setting(2**25, "Tokens that all lanes together keep open; the rows that start in them are handed out in random order, so a step holds rows of many documents. 2 or 4 bytes each, twice. 0: rows follow the documents, as in runs of earlier versions.", absent=0)
    prefetch: int = setting(2, "Global batches prepared ahead in a background thread. 0: none.")


@dataclass
class TokenizerConfig:
    """The tokenizer."""

    kind: str = setting("bpe", "For building shards: bpe (train a byte-level BPE) | bytes (256 byte values) | file (use `path`).")
    path: str = setting("", "A tokenizer.json. Training: empty takes the dataset's own; a file given here must be the one that made the shards.")
    vocab_size: int = setting(4096, "Entries of a trained BPE, special tokens included.")
    train_bytes: int = setting(16_000_000, "At most so much text is read to train a BPE.")
    eos_token: str = setting("", "Name of the token that ends a document. Building shards with kind=file: empty takes the known name that is flagged special. Training: the dataset's own, which need not be given.")


@dataclass
class OptimConfig:
    """AdamW. Weight decay acts on matrices only (the embedding is one; norms are not)."""

    lr: float = setting(1e-3, "Peak learning rate.")
    beta1: float = setting(0.9, "Decay of the first moment.")
    beta2: float = setting(0.95, "Decay of the second moment.")
    eps: float = setting(1e-8, "Added to the root of the second moment.")
    weight_decay: float = setting(0.1, "Decoupled weight decay of matrices.")
    clip: float = setting(1.0, "Largest global gradient norm. 0: no clipping.")
    head_lr_ratio: float = setting(1.0, "Learning rate of the MTP modules as a multiple of `lr`.")


@dataclass
class ScheduleConfig:
    """Learning rate over tokens trained."""

    kind: str = setting("cosine", "cosine | wsd (warm-up, stable, linear decay) | constant; each after a linear warm-up.")
    warmup_tokens: int = setting(0, "Tokens of linear warm-up from 0.")
    decay_tokens: int | None = setting(None, "wsd: tokens of the final decay. null: a fifth of the run.")
    min_ratio: float = setting(0.1, "Learning rate at the end, as a share of the peak.")


@dataclass
class TrainConfig:
    """The loop."""

    global_batch: int = setting(32, "Sequences in one optimizer step, over all replicas.")
    micro_batch: int = setting(4, "Sequences in one forward pass of one replica.")
    sequence_length: int = setting(256, "S: positions trained in a row; a row holds S + 1 + D mtp.stride tokens.")
    steps: int | None = setting(None, "Optimizer steps of the whole run; give this or `tokens`.")
    tokens: int | None = setting(None, "Trained positions of the whole run; rounded up to whole steps.")
    dtype: str = setting("bfloat16", "bfloat16 (with float32 masters, accumulation and reduction) | float32.")
    recompute: str = setting("none", "Activation checkpointing of trunk blocks: none | selective (keep matrix products and attention) | full (keep only inputs).")
    attention: str = setting("auto", "Attention kernel: auto | causal (plain; only with model.document_mask=false) | masked (a mask of documents; any device) | varlen (documents end to end; CUDA, bfloat16) | flex (compiled; CUDA). All compute the same. auto: causal without document_mask, else varlen, flex or masked, the first that can run.")
    compile: bool = setting(False, "torch.compile of every block; needs a C++ compiler on CPU, Triton on CUDA. Weight gradients of blocks are then not split from their backward pass.")
    deterministic: bool = setting(True, "Deterministic kernels and a fixed number of threads: what bit-identical resume promises.")
    trace: bool = setting(False, "Record one optimizer step (the third of this start, or the last if there are fewer): run_dir/trace/step_N.json for Perfetto, step_N.png, and the pipeline bubble as a metric.")
    nonfinite: str = setting("stop", "A step with a non-finite loss or gradient: stop | skip (the weights and the learning rate stay).")
    nonfinite_limit: int = setting(5, "With skip: more skipped steps in a row than this end the run.")
    log_every_steps: int = setting(1, "Steps between tracked metrics.")
    log_every_minutes: float = setting(0.0, "Also after so many minutes. 0: never.")
    progress: bool = setting(True, "A progress bar on rank 0 where the output is a terminal, else a line now and then.")


@dataclass
class ValidationConfig:
    """Held-out loss during training, under the training layout."""

    every_steps: int = setting(0, "Steps between validations. 0: only at the end.")
    every_minutes: float = setting(0.0, "Also after so many minutes. 0: never.")
    sequences: int = setting(64, "Rows read each time, always the same, evenly spaced over the validation split; a multiple of train.global_batch is best.")
    prompt: str = setting("", "A text that the model continues at each validation, greedily and with its own drafts: printed, kept in run_dir/samples. Empty: none.")
    prompt_tokens: int = setting(64, "Tokens of that continuation at most.")


@dataclass
class InitConfig:
    """What a new run starts from. A run that has checkpoints of its own goes on from them."""

    checkpoint: str = setting("", "A checkpoint folder, or a run folder (its newest): start from its float32 weights. Empty: from random weights.")
    heads: str = setting("keep", "keep (the checkpoint's MTP heads; mtp.depth may differ: heads that it lacks start fresh, those beyond are dropped) | fresh (all from random weights).")
    optimizer: bool = setting(False, "Take Adam's moments, too; those of the heads only where all of them are kept.")


@dataclass
class CheckpointConfig:
    """When to save and what to keep."""

    every_steps: int = setting(0, "Steps between checkpoints. 0: only at the end and when asked to stop.")
    every_minutes: float = setting(0.0, "Also after so many minutes. 0: never.")
    asynchronous: bool = setting(True, "Training waits only for a copy of each rank's part in host memory (12 bytes an element of the optimizer's shard); a thread writes it. false: it waits for the disk, and no copy is made.")
    keep_last: int = setting(2, "Newest checkpoints kept. 0: all.")
    keep_every_steps: int = setting(0, "Checkpoints whose step is a multiple of this are never deleted. 0: none.")


@dataclass
class TrackerConfig:
    """Where metrics go. metrics.jsonl in the run folder is always written and is the truth."""

    wandb: str = setting("offline", "offline | online | disabled. A missing or failing wandb never stops a job.")
    project: str = setting("mtp_dist", "wandb project.")
    entity: str | None = setting(None, "wandb entity.")
    name: str | None = setting(None, "wandb run name. null: the run folder's name.")
    tags: list[str] = setting([], "wandb tags.")
    tensorboard: bool = setting(False, "Also write TensorBoard events (needs the tensorboard package).")


@dataclass
class LaunchConfig:
    """How processes are started."""

    nodes: int = setting(1, "Machines.")
    processes_per_node: int | None = setting(None, "Processes on each machine, one an accelerator. null: world size / nodes.")
    threads: int = setting(0, "CPU threads of each process. 0: cores / processes of the node (Slurm: launch.cpus_per_task); with train.deterministic the number found at the first start stays, wherever the run resumes.")
    master_addr: str = setting("127.0.0.1", "Several nodes by torchrun: address of the first one.")
    master_port: int = setting(0, "Port of the rendezvous. 0: a free one (one node), 29400 (several).")
    node_rank: int = setting(0, "Several nodes by torchrun: which one this is.")
    device: str = setting("auto", "auto | cpu | cuda.")
    # Slurm (launch/slurm.py)
    partition: str | None = setting(None, "Slurm partition.")
    account: str | None = setting(None, "Slurm account.")
    qos: str | None = setting(None, "Slurm quality of service.")
    time: str = setting("24:00:00", "Slurm time limit.")
    gpus_per_node: int | None = setting(None, "GPUs asked for on each node. null: none.")
    cpus_per_task: int | None = setting(None, "CPU cores of each process. null: not asked for.")
    mem: str | None = setting(None, "Memory of each node, as Slurm takes it.")
    job_name: str | None = setting(None, "Slurm job name. null: the run folder's name.")
    signal_seconds: int = setting(120, "Seconds before the time limit at which the job saves, stops and is put in the queue again.")
    requeue: bool = setting(True, "Put a job that was preempted, timed out or lost a node in the queue again.")
    max_restarts: int = setting(20, "Requeues after which the job stays down.")
    directives: list[str] = setting([], "More #SBATCH lines, as --option=value.")
    setup: list[str] = setting([], "Shell lines run on the first node before the job (modules, environment).")


@dataclass
class DecodeConfig:
    """How tokens are drawn from a trained model."""

    mode: str = setting("speculative", "plain (one token a forward) | speculative (draft, verify in one forward, accept) | both (compare).")
    max_new_tokens: int = setting(128, "Tokens generated at most for each prompt.")
    drafter: str = setting("heads", "Who drafts: heads (the model's own) | ngram (what followed the same tokens earlier in the text) | model (a smaller one).")
    draft: int | None = setting(None, "Gamma, tokens drafted a round; above D the last module is recycled (not parallel, medusa). null: D (with `auto` up to 2 D, at least 4); other drafters: 4.")
    auto: bool = setting(False, "Choose gamma (of a tree: its depth) anew each round, from 0 (plain) to `draft`, by measured costs and acceptance. Sampled texts then differ from run to run, their distribution does not.")
    tree: str = setting("none", "none (one chain of drafts) | static (a tree of drafts of a fixed shape, Medusa's) | dynamic (its shape follows the drafter's confidence, EAGLE-2's). All nodes are verified in one forward; `draft` is the depth.")
    tree_nodes: int = setting(16, "Nodes of the tree at most; static: of the default shape.")
    tree_width: int = setting(4, "dynamic: nodes of each depth that get children, and children of each; static: choices of a node in the default shape.")
    tree_shape: list[list[int]] = setting([], "tree=static: each node as the path of choices to it, 0 the likeliest, for example [[0],[1],[0,0]]. []: the `tree_nodes` paths likeliest if choice r is right with probability 1/2^(r+1).")
    draft_model: str = setting("", "drafter=model: a checkpoint folder, a run folder, or a Hugging Face folder (needs transformers) of a model with the same tokenizer.")
    ngram: int = setting(3, "drafter=ngram: the longest run of tokens that is looked up; shorter ones follow.")
    verify: str = setting("lossless", "lossless (texts are distributed as the model alone writes them) | typical (lossy: a draft is kept if it is likely enough, Medusa's rule; needs a temperature).")
    typical_epsilon: float = setting(0.09, "verify=typical: a draft more likely than this is kept.")
    typical_delta: float = setting(0.3, "verify=typical: so is one more likely than this times exp(-entropy of the model's distribution).")
    temperature: float = setting(0.0, "0: greedy. Else softmax temperature.")
    top_k: int = setting(0, "Sample among the k most likely tokens. 0: all.")
    top_p: float = setting(1.0, "Sample among the likeliest tokens that hold this probability.")
    stop_at_eos: bool = setting(True, "End a text at the end-of-document token.")
    stop: list[str] = setting([], r'Strings that end a text; it is cut before the one that is complete first. Escapes as \n, \t, \\, \u3002 have their meaning; a comma needs quotes: [\n\n,"}, {"].', escapes=True)
    batch: int = setting(1, "Prompts decoded side by side; the next one takes the place of one whose text has ended.")
    dtype: str = setting("float32", "float32 | bfloat16 | float64.")
    int8: bool = setting(False, "Weights of linear layers in 8 bits, one scale an output, activations in `dtype`: less memory to read a token, a slightly different model.")
    compile: bool = setting(False, "torch.compile of the blocks around attention; needs a C++ compiler on CPU, Triton on CUDA. The first passes then take seconds.")
    threads: int = setting(0, "CPU threads. 0: torch's own choice.")


@dataclass
class ProgramConfig:
    """task=humaneval: programs that the model writes are run to see whether they are right."""

    allow: bool = setting(False, "Run programs that nobody has read. They are fenced in (no network, no other files, processes or programs; limits on time, memory and files; not as root), which stops mistakes, not an attacker of the kernel.")
    samples: int = setting(1, "n, programs for each problem; more than one needs decode.temperature above 0.")
    k: list[int] = setting([1], "pass@k for each of these; at most `samples`.")
    completions: str = setting("", "JSON lines with task_id and completion to be judged instead of a model's own.")
    seconds: float = setting(5.0, "Time of one program.")
    memory_mb: int = setting(512, "Address space of one program, in MiB.")


@dataclass
class TrainingRun:
    """`python -m mtp_dist.train`."""

    run_dir: str = setting("", "Folder of the run: configuration, metrics, checkpoints. Started again in it, the job resumes.")
    seed: int = setting(1234, "Seed of weights and data order.")
    model: ModelConfig = group(ModelConfig, "The trunk.")
    mtp: MTPConfig = group(MTPConfig, "The MTP heads.")
    parallel: ParallelConfig = group(ParallelConfig, "The layout.")
    zero: ZeroConfig = group(ZeroConfig, "The sharded optimizer.")
    data: DataConfig = group(DataConfig, "The shards.")
    tokenizer: TokenizerConfig = group(TokenizerConfig, "The tokenizer.")
    optim: OptimConfig = group(OptimConfig, "AdamW.")
    schedule: ScheduleConfig = group(ScheduleConfig, "Learning rate over tokens.")
    train: TrainConfig = group(TrainConfig, "The loop.")
    validation: ValidationConfig = group(ValidationConfig, "Held-out loss during training.")
    init: InitConfig = group(InitConfig, "Where a new run's weights come from.")
    checkpoint: CheckpointConfig = group(CheckpointConfig, "Checkpoints.")
    tracker: TrackerConfig = group(TrackerConfig, "Metrics.")
    launch: LaunchConfig = group(LaunchConfig, "Processes.")


@dataclass
class Generation:
    """`python -m mtp_dist.generate`."""

    checkpoint: str = setting("", "A checkpoint folder, or a run folder (its newest checkpoint).")
    prompt: str = setting("", r"Text to continue, taken literally: \n in it is a backslash and an n. Lines: prompt=$'one\ntwo' in bash, or prompt_file.")
    prompt_file: str = setting("", "A text file of prompts separated by lines of three dashes, or a .jsonl file with a JSON string a line; in place of `prompt`.")
    interactive: bool = setting(False, "Read lines from the terminal, or a pipe: each goes behind the text so far, and the model goes on from there. It continues text, it does not chat. `prompt` is the first line; /help lists commands.")
    stream: bool = setting(False, "Show each text while it grows. One prompt at a time, so not with decode.batch > 1 or decode.mode=both.")
    color: str = setting("auto", "Drafts that were accepted are green: always | never | auto (on a terminal, unless NO_COLOR is set).")
    seed: int = setting(0, "Seed of sampling.")
    output: str = setting("", "Also write the results as JSON to this file.")
    decode: DecodeConfig = group(DecodeConfig, "Decoding.")
    parallel: ParallelConfig = group(ParallelConfig, "The layout. Several replicas share the prompts.")
    launch: LaunchConfig = group(LaunchConfig, "Processes.")


@dataclass
class Serving:
    """`python -m mtp_dist.serve`: OpenAI's completions over HTTP."""

    checkpoint: str = setting("", "A checkpoint folder, or a run folder (its newest checkpoint).")
    host: str = setting("127.0.0.1", "Address to listen at. Any but a loopback address is open to the network; there is no password.")
    port: int = setting(8000, "Port. 0: a free one, which the first line of output names.")
    name: str = setting("", "The model's name in requests. Empty: the run folder's.")
    longest: int | None = setting(None, "Tokens of a prompt and its continuation together. null: the checkpoint's train.sequence_length.")
    waiting: int = setting(64, "Texts that may wait for the model, and most texts of a request; more are refused. `decode.batch` are decoded together.")
    seconds: float = setting(120.0, "A request that takes longer is ended.")
    body_kib: int = setting(256, "Size of a request's body, in KiB.")
    connections: int = setting(256, "Connections at one time; one more is refused.")
    header_seconds: float = setting(10.0, "Time for a request's header, from the connection's start or the header's first byte.")
    body_seconds: float = setting(30.0, "Time for a request's body.")
    idle_seconds: float = setting(30.0, "An open connection that asks nothing more is closed after this time.")
    write_seconds: float = setting(30.0, "A client that takes less than 16 KiB of an answer that waits is cut off after this time.")
    hosts: list[str] = setting([], "Names by which clients reach this server, besides `host`, loopback names and the address that a connection came in at; `*.name` for all below it, `*` for any. Other values of the Host header are refused, which keeps web pages from reading answers by DNS rebinding.")
    origins: list[str] = setting([], "Web pages that may ask, by origin (http://localhost:3000), `*` for any. Pages from elsewhere are refused.")
    patience: float = setting(10.0, "Seconds that running requests have once the server is asked to stop.")
    decode: DecodeConfig = group(DecodeConfig, "Decoding; `temperature`, `top_k`, `top_p`, `max_new_tokens` and `stop` hold for requests that name none.")


@dataclass
class Evaluation:
    """`python -m mtp_dist.evaluate`. Model, heads and data come from the checkpoint; the layout may be another one."""

    task: str = setting("held_out", "held_out (loss and accuracy of each depth on a dataset) | humaneval (pass@k: programs that the model writes pass their tests) | decode (a report on speculative decoding).")
    file: str = setting("", "task=humaneval: the problems, JSON lines as of HumanEval, also gzipped. task=decode: prompts, as prompt_file of generate.")
    files: list[str] = setting([], "task=decode, in place of file: several prompt files, each a set of its own in the report.")
    temperatures: list[float] = setting([], "task=decode: every set is decoded at each of these. Empty: at decode.temperature.")
    seed: int = setting(0, "task=humaneval and task=decode: seed of sampling.")
    checkpoint: str = setting("", "A checkpoint folder, or a run folder (its newest checkpoint).")
    data: str = setting("", "Dataset folder. Empty: the one that the checkpoint was trained on.")
    split: str = setting("validation", "Which split of the dataset.")
    sequences: int = setting(64, "Rows read, evenly spaced over the split.")
    micro_batch: int = setting(4, "Sequences in one forward pass of one replica.")
    output: str = setting("", "Also write the results as JSON to this file. task=decode: folder of the report.")
    dtype: str | None = setting(None, "float32 | bfloat16. null: the checkpoint's.")
    programs: ProgramConfig = group(ProgramConfig, "Programs of task=humaneval.")
    decode: DecodeConfig = group(DecodeConfig, "Decoding, for task=humaneval and task=decode.")
    parallel: ParallelConfig = group(ParallelConfig, "The layout.")
    launch: LaunchConfig = group(LaunchConfig, "Processes.")


@dataclass
class Export:
    """`python -m mtp_dist.export`: a checkpoint in a format that other projects read."""

    checkpoint: str = setting("", "A checkpoint folder, or a run folder (its newest checkpoint).")
    out: str = setting("", "Folder to make; it must not exist.")
    format: str = setting("hf", "hf (Hugging Face: a Llama trunk, MTP modules named as in DeepSeek-V3).")
    dtype: str | None = setting(None, "float32 | bfloat16. null: the checkpoint's train.dtype.")
    heads: bool = setting(True, "Also the MTP modules; false: the trunk alone.")
    shard_gb: float = setting(4.0, "Largest size of a weight file, in 10^9 bytes. Memory holds one tensor at a time.")


@dataclass
class Inspection:
    """`python -m mtp_dist.inspect`: what a checkpoint or a dataset holds, whether it is sound, and how two checkpoints differ."""

    checkpoint: str = setting("", "A checkpoint folder, a run folder (its newest checkpoint), or a dataset. `checkpoint=` may be left out.")
    other: str = setting("", "A second one to compare with. `other=` may be left out.")
    verify: bool = setting(True, "Read every file and check its SHA-256, of a dataset every document; exit status 1 where one is damaged.")
    parameters: bool = setting(False, "List every parameter; when comparing, every one that differs (else the ten that differ most).")


@dataclass
class ShardBuild:
    """`python data/build_shards.py`: text to tokenised shards, with a tokenizer trained on the way where wanted."""

    source: str = setting("python_stdlib", "python_stdlib | text | jsonl | parquet | hf (a datasets folder on disk).")
    input: list[str] = setting([], "Files, folders or glob patterns of the source; python_stdlib needs none.")
    out: str = setting("", "Dataset folder to make.")
    field: str = setting("text", "jsonl, parquet, hf: the field that holds the text.")
    separator: str = setting("", r"text: documents are separated by this string, in which escapes as \n, \t, \\, \u3002 have their meaning. Empty: one document a file.", escapes=True)
    validation_share: float = setting(0.05, "Share of documents held out, chosen by a hash of each document's name.")
    shard_mb: float = setting(64.0, "Size of a shard in MiB, about.")
    limit_mb: float = setting(0.0, "Stop after so many MiB of text. 0: all of it.")
    workers: int = setting(0, "Tokenizing threads. 0: one a core.")
    tokenizer: TokenizerConfig = group(TokenizerConfig, "The tokenizer to train or use.")


@dataclass
class Report:
    """`python -m mtp_dist.report`."""

    run_dir: str = setting("", "Folder of the run. `run_dir=` may be left out.")
    output: str = setting("", "Folder for the plots. Empty: <run_dir>/report.")


@dataclass
class Plan(TrainingRun):
    """`python -m mtp_dist.plan`: what a training configuration would do, without doing it."""

    world_memory_gib: float = setting(80.0, "Memory of one device, for the fit check.")
    measure: bool = setting(False, "Time a block and the heads on this machine, plan with these times, and print them for parallel.costs.")


@dataclass
class ChoiceTask:
    """experiment=choice_points: rows that follow one known path up to a choice, and one of several known paths after it."""

    choice: int = setting(3, "Token after which the path is chosen at random; that step is the hard transition. Between mtp.depth and train.sequence_length - 1.")
    branches: int = setting(8, "Paths that go on from there, equally likely.")
    rows: int = setting(64, "Rows of which gradients are measured, one by one.")


@dataclass
class PathStarTask:
    """experiment=path_star: arms that meet in one node; find the arm that ends in the goal (Bachmann and Nagarajan, arXiv 2403.06963)."""

    degree: int = setting(2, "Arms.")
    length: int = setting(4, "Nodes of an arm beside the common one.")
    nodes: int = setting(12, "Labels, drawn anew for each graph.")
    reverse: bool = setting(False, "The path is written from the goal back to the start, which needs no planning: shows what the model can learn.")
    test_rows: int = setting(512, "Graphs on which the trained model is tested.")


@dataclass
class InductionTask:
    """experiment=induction: names of two tokens, drawn anew for each row; the second follows from the first once it was seen (Gloeckle, arXiv 2404.19737, section 4.1)."""

    names: int = setting(16, "Tokens of which names are made.")
    words: int = setting(16, "Other tokens, with a fixed table of what may follow what.")
    people: int = setting(2, "Names in a row.")
    mentions: int = setting(8, "Names written in a row, first ones included.")
    test_rows: int = setting(512, "Rows on which the trained model is tested.")


@dataclass
class PolynomialTask:
    """experiment=polynomials: arithmetic of Z_p[X] / (X^n) in Polish notation (Gloeckle, arXiv 2404.19737, section 4.2: p = 7, n = 5)."""

    modulus: int = setting(7, "p, a prime.")
    coefficients: int = setting(2, "n, coefficients of a polynomial.")
    operations: int = setting(2, "At most so many operations in an expression of the training rows.")
    beyond: int = setting(3, "Tested up to so many.")
    test_rows: int = setting(256, "Expressions with each number of operations on which the trained model is tested.")


@dataclass
class TextTask:
    """experiment=heads, schedules and chaining: Python's standard library, built where data.path is empty."""

    limit_mb: float = setting(4.0, "So many MiB of source text. 0: all.")
    sequences: int = setting(128, "Held-out rows that are tested.")
    prompts: int = setting(16, "experiment=heads, chaining: held-out prompts that each trained model continues, plainly and with its own drafts.")
    prompt_tokens: int = setting(24, "experiment=heads, chaining: length of a prompt.")
    new_tokens: int = setting(40, "experiment=heads, chaining: length of a continuation.")
    temperature: float = setting(0.0, "experiment=heads, chaining: 0 writes greedily, and a small model then repeats itself, which any drafts meet; 1 samples from the model, losslessly.")


@dataclass
class Study(TrainingRun):
    """`python -m mtp_dist.study`: an experiment: variants of one training run, each with several seeds, a table and a plot."""

    experiment: str = setting("", "choice_points | path_star | induction | polynomials | heads | schedules | chaining.")
    size: str = setting("laptop", "laptop (15 minutes at most on two cores) | paper (what the paper had, or near it: checked, not run).")
    seeds: list[int] = setting([1, 2, 3], "One training each; equal seeds see equal data in all variants.")
    variants: dict[str, list[str]] = setting({}, "Name -> settings that differ, as typed on the command line. The first is the one that others are compared with.")
    only: list[str] = setting([], "Names of the variants to run. Empty: all.")
    parameters: int | None = setting(None, "model.mlp is chosen so that the whole model has this many parameters, about. null: model.mlp as given.")
    check_only: bool = setting(False, "Check the settings of every variant, print what it would cost, and stop.")
    choice_points: ChoiceTask = group(ChoiceTask, "The task of experiment=choice_points.")
    path_star: PathStarTask = group(PathStarTask, "The task of experiment=path_star.")
    induction: InductionTask = group(InductionTask, "The task of experiment=induction.")
    polynomials: PolynomialTask = group(PolynomialTask, "The task of experiment=polynomials.")
    text: TextTask = group(TextTask, "The text of experiment=heads, schedules and chaining.")


def describe(cls: type) -> dict[str, tuple[Any, Any, str]]:
    """Field name -> (type, default, text) of one schema class."""
    rows = {}
    for name, item in cls.__dataclass_fields__.items():  # type: ignore[attr-defined]
        default = item.default if item.default is not MISSING else item.default_factory()
        rows[name] = (item.type, default, item.metadata.get("text", ""))
    return rows
