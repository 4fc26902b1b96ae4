"""Every metric of a training run: its name and what it measures.

The names are the contract between the trainer, the trackers, ``mtp_dist.report`` and whoever reads metrics.jsonl. A name that
ends in ``_`` below is completed with a depth, 1 .. D: ``loss/depth_`` stands for loss/depth_1, loss/depth_2, ...
Losses are means over valid targets of the whole global batch, in nats; accuracies are shares of valid targets between 0 and 1.
With mtp.targets=trunk the target of depth k is the trunk's distribution k positions on: losses of depths are cross-entropies with
it, and right is whoever names its likeliest token, which is teacher-forced acceptance.
"""

LOSS_TOTAL = "loss/total"
LOSS_MAIN = "loss/main"
LOSS_DEPTH = "loss/depth_"
LOSS_FEATURES_DEPTH = "loss_features/depth_"
LOSS_ADVERSARY_DEPTH = "loss_adversary/depth_"
ACCURACY_MAIN = "accuracy/main"
ACCURACY_DEPTH = "accuracy/depth_"
ACCURACY_CONDITIONAL_DEPTH = "accuracy_conditional/depth_"
VALIDATION_LOSS_TOTAL = "validation/loss_total"
VALIDATION_LOSS_MAIN = "validation/loss_main"
VALIDATION_LOSS_DEPTH = "validation/loss_depth_"
VALIDATION_LOSS_FEATURES_DEPTH = "validation/loss_features_depth_"
VALIDATION_LOSS_ADVERSARY_DEPTH = "validation/loss_adversary_depth_"
VALIDATION_ACCURACY_MAIN = "validation/accuracy_main"
VALIDATION_ACCURACY_DEPTH = "validation/accuracy_depth_"
VALIDATION_ACCURACY_CONDITIONAL_DEPTH = "validation/accuracy_conditional_depth_"
VALIDATION_TOKENS_PER_FORWARD = "validation/tokens_per_forward"
LEARNING_RATE = "optim/lr"
GRADIENT_NORM = "optim/gradient_norm"
SKIPPED_STEPS = "optim/skipped_steps"
MAIN_LOSS_WEIGHT = "mtp/main_loss_weight"
LOSS_WEIGHT = "mtp/loss_weight"
SCHEDULED_SAMPLING = "mtp/scheduled_sampling"
DEPTH_IN_FORCE = "mtp/depth"
TOKENS_SEEN = "data/tokens_seen"
EPOCH = "data/epoch"
TOKENS_PER_SECOND = "speed/tokens_per_second"
STEP_TIME = "time/step"
DATA_WAIT = "time/data_wait"
FORWARD_BACKWARD_TIME = "time/forward_backward"
OPTIMIZER_TIME = "time/optimizer"
VALIDATION_TIME = "time/validation"
SAVE_TIME = "time/save"
PIPELINE_BUBBLE = "pipeline/bubble"
MEMORY_RSS = "memory/rss_gib"
MEMORY_DEVICE_PEAK = "memory/device_peak_gib"

MEANING = {
    LOSS_TOTAL: "The differentiated loss: main (times lambda_0) + lambda-weighted depths.",
    LOSS_MAIN: "Cross-entropy of the next token.",
    LOSS_DEPTH: "Cross-entropy of the token k beyond the next one; eagle: that and the distance below, as they are weighted.",
    LOSS_FEATURES_DEPTH: "eagle: SmoothL1 distance of depth k's states from the trunk's.",
    LOSS_ADVERSARY_DEPTH: "mtp.adversarial: the discriminator's loss on depth k, 2 ln 2 where it cannot tell.",
    ACCURACY_MAIN: "Share of next tokens whose argmax is right.",
    ACCURACY_DEPTH: "Share of targets of depth k whose argmax is right.",
    ACCURACY_CONDITIONAL_DEPTH: "The same, where the trunk and all shallower depths are right: a forecast of acceptance.",
    VALIDATION_LOSS_TOTAL: "loss/total on the held-out split, without the adversarial term.",
    VALIDATION_LOSS_MAIN: "loss/main on the held-out split.",
    VALIDATION_LOSS_DEPTH: "loss/depth_k on the held-out split.",
    VALIDATION_LOSS_FEATURES_DEPTH: "loss_features/depth_k on the held-out split.",
    VALIDATION_LOSS_ADVERSARY_DEPTH: "loss_adversary/depth_k on the held-out split.",
    VALIDATION_ACCURACY_MAIN: "accuracy/main on the held-out split.",
    VALIDATION_ACCURACY_DEPTH: "accuracy/depth_k on the held-out split.",
    VALIDATION_ACCURACY_CONDITIONAL_DEPTH: "accuracy_conditional/depth_k on the held-out split.",
    VALIDATION_TOKENS_PER_FORWARD: "Tokens that a forward gives, of the text behind validation.prompt: accepted drafts and one.",
    LEARNING_RATE: "Learning rate of the step.",
    GRADIENT_NORM: "Global gradient norm before clipping.",
    SKIPPED_STEPS: "Steps skipped so far because a loss or gradient was not finite (train.nonfinite=skip).",
    MAIN_LOSS_WEIGHT: "Lambda_0 of the step.",
    LOSS_WEIGHT: "Lambda of the step.",
    SCHEDULED_SAMPLING: "Probability that a depth was fed the model's own prediction in this step.",
    DEPTH_IN_FORCE: "Depths that the step trains (mtp.curriculum).",
    TOKENS_SEEN: "Positions read since the start of the run, resumes and skipped steps included.",
    EPOCH: "Passes over the training split, as a fraction.",
    TOKENS_PER_SECOND: "Trained positions a second over all replicas.",
    STEP_TIME: "Seconds of a step, data included.",
    DATA_WAIT: "Seconds of a step spent waiting for data.",
    FORWARD_BACKWARD_TIME: "Seconds of a step from its rows to the gradients, waits of the pipeline included (rank 0).",
    OPTIMIZER_TIME: "Seconds of a step for reducing gradients, clipping and AdamW (rank 0).",
    VALIDATION_TIME: "Seconds of the validation after this step.",
    SAVE_TIME: "Seconds that training waited for saves since the record before; a save after the last step is in no record.",
    PIPELINE_BUBBLE: "Share of the recorded step's schedule (train.trace) in which a rank computes nothing, mean over ranks.",
    MEMORY_RSS: "Resident memory of rank 0, GiB (CPU runs).",
    MEMORY_DEVICE_PEAK: "Peak allocated device memory of rank 0, GiB (CUDA runs).",
}


def of_depth(prefix: str, depth: int) -> str:
    """Metric name of one depth (1 .. D): ``of_depth(LOSS_DEPTH, 2) == "loss/depth_2"``."""
    return f"{prefix}{depth}"
