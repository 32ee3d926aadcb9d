"""Config keys with default, valid range and meaning; dualsm/objectives/ has those of the mixture."""

from __future__ import annotations

from typing import Any, NamedTuple

from dualsm.model import id_ranges
from dualsm.model.attention import BACKENDS
from dualsm.model.output_heads import HEADS
from dualsm.model.remat import POLICIES
from dualsm.model.rope import SCALINGS
from dualsm.objectives.share_schedule import SCHEDULES as SHARE_SCHEDULES
from dualsm.optimizers.optimizer import OPTIMIZERS
from dualsm.optimizers.schedules import SCHEDULES
from dualsm.optimizers.weight_decay import EXEMPTIBLE
from dualsm.optimizers.weight_decay import SCHEDULES as DECAY_SCHEDULES
from dualsm.process.value_rules import (
    ANY,
    BELOW_ONE,
    COUNTS,
    FRACTION,
    POSITIVE,
    Rule,
    at_least,
    between,
    one_of,
    subset_of,
)


class Key(NamedTuple):
    """A config key. The type of the default is the type of the key."""

    name: str
    default: Any
    rule: Rule
    doc: str


_RANGES = Rule(id_ranges.is_valid, "be ranges of ids, such as 4-15,320")
_AXIS = Rule(lambda v: v == -1 or v >= 1, "be at least 1, or -1 for all remaining devices")

# Defaults are the paper's values (arXiv 2512.14549) where it has them. The keys of the mixture, of pairs,
# of sources and of the options of objectives are defined in dualsm/objectives/.
KEYS = [
    Key("seed", 0, at_least(0), "Determines initial weights, document order and corruption."),
    Key("steps", 1000, between(1, 10**7), "Optimizer steps of the run."),
    Key("batch_size", 64, at_least(1), "Sequences per step, over all devices."),
    Key("seq_len", 256, at_least(1), "L, tokens per sequence."),
    Key("repetitions", 1, at_least(1), "R, number of passes over the unique tokens of the run."),
    Key("gradient_accumulation_steps", 1, at_least(1), "Does not change the result."),
    Key(
        "per_device_batch_size", 0, at_least(0), "Maximum number of sequences per device. 0 derives it from "
        "`gradient_accumulation_steps`, or from the cache size on a CPU (`sharding.accumulation_steps`).",
    ),
    Key("max_consecutive_skips", 20, at_least(1), "Stop after this many consecutive non-finite updates."),

    Key("mixture_schedule.name", "constant", one_of(SHARE_SCHEDULES), "Interpolation between the points."),
    Key(
        "mixture_schedule.path", "", ANY, "Points after the start, at a fraction of the steps: "
        "'0.5 causal=0.25 masked_diffusion=0.75; 1 causal=1'.",
    ),

    Key("sources_schedule.name", "constant", one_of(SHARE_SCHEDULES), "Schedule of the sources' shares."),
    Key(
        "sources_schedule.path", "", ANY, "Points after the start, as in mixture_schedule.path: "
        "'0.5 small=0.25 large=0.75'.",
    ),

    Key("data.path", "", ANY, "Corpus, the output of `python -m dualsm.prepare`."),
    Key("data.identity", "", ANY, "Hash of the corpus; set by the run, which resumes only on this corpus."),
    Key(
        "data.order_version", 0, at_least(0), "Version of the order of documents and sequences; set by the "
        "run, which resumes only in this order. 0: not set, or the order of earlier versions.",
    ),
    Key("data.verify", True, ANY, "Verify the hashes of all corpus files before the first checkpoint."),
    Key("data.num_threads", 1, at_least(1), "Prefetch threads."),
    Key("data.prefetch_steps", 4, at_least(1), "Steps that are prefetched."),

    Key("model.num_layers", 4, at_least(1), "Transformer blocks."),
    Key("model.d_model", 256, at_least(1), "D, width of the residual stream."),
    Key("model.num_heads", 4, at_least(1), "H, query heads; must divide d_model unless head_dim is set."),
    Key("model.num_kv_heads", 0, at_least(0), "Z, key and value heads; must divide num_heads. 0: num_heads."),
    Key("model.head_dim", 0, at_least(0), "K, size of a head, even. 0: d_model / num_heads."),
    Key("model.qkv_bias", False, ANY, "Queries, keys and values have a bias, as in Qwen2."),
    Key(
        "model.qk_norm", "none", one_of(("none", "head", "projection")), "RMS norm of queries and keys "
        "before RoPE: of each head, as in Qwen3, or of the whole projection, as in OLMo2.",
    ),
    Key(
        "model.norm_placement", "pre", one_of(("pre", "post")), "RMS norms of the inputs of attention and "
        "MLP, or of their outputs, as in OLMo2.",
    ),
    Key("model.d_ff", 704, at_least(1), "F, inner width of SwiGLU."),
    Key("model.vocab_size", 0, at_least(0), "0: that of the corpus; other values must equal it."),
    Key("model.head", "projected", one_of(HEADS), "projected: as in the paper. plain: as in Llama, no bias."),
    Key(
        "model.never_predicted", "", _RANGES, "Ids whose logits are masked, such as '4-15,320'; set by an "
        "import, and by the run.",
    ),
    Key("model.tie_word_embeddings", False, ANY, "The output matrix is the transposed embedding."),
    Key("model.rope_theta", 160_000.0, POSITIVE, "Base of the rotary position embedding."),
    Key("model.rope_scaling.name", "none", one_of(SCALINGS), "llama3 uses the four keys below."),
    Key("model.rope_scaling.factor", 8.0, at_least(1), "Divisor of low frequencies."),
    Key(
        "model.rope_scaling.low_freq_factor", 1.0, POSITIVE, "Frequencies with fewer cycles per original "
        "length are divided.",
    ),
    Key(
        "model.rope_scaling.high_freq_factor", 4.0, POSITIVE, "Frequencies with more cycles per original "
        "length are unchanged.",
    ),
    Key(
        "model.rope_scaling.original_max_position_embeddings", 8192, at_least(1), "Original length: tokens "
        "per sequence before the context was extended.",
    ),
    Key("model.no_rope_layer_interval", 0, at_least(0), "n: every n-th layer has no RoPE. 0: none."),
    Key("model.norm_eps", 1e-7, POSITIVE, "Epsilon of the RMS norms."),
    Key(
        "model.dtype", "float32", one_of(("float32", "bfloat16")), "Of the computation; parameters are "
        "float32. Use bfloat16 on accelerators.",
    ),
    Key(
        "model.remat", "matmuls", one_of(POLICIES), "What the backward pass reuses: results of matmuls and "
        "attention; nothing (full); everything (none). matmuls is the fastest on CPU and saves memory.",
    ),
    Key(
        "model.dropout", 0.0, BELOW_ONE, "Dropout rate of embeddings, attention output and MLP output in "
        "training; 0: none.",
    ),
    Key("model.attention", "auto", one_of(BACKENDS), "auto: splash on TPUs, flash on GPUs, otherwise xla."),

    Key("loss.z_loss", 1e-4, at_least(0), "Weight of the squared log normalizer."),
    Key("loss.chunk_size", 128, at_least(1), "Positions per row whose logits are in memory together."),

    Key("optimizer.name", "muon", one_of(OPTIMIZERS), "See dualsm/optimizers/optimizer.py."),
    Key("optimizer.learning_rate", 7e-3, POSITIVE, "Peak learning rate."),
    Key(
        "optimizer.adamw_learning_rate", 0.0, at_least(0), "Peak learning rate of the parameters that AdamW "
        "updates under Muon; 0: learning_rate.",
    ),
    Key("optimizer.weight_decay", 0.1, at_least(0), "Multiplied as weight_decay_schedule says."),
    Key(
        "optimizer.weight_decay_schedule.name", "learning_rate",
        one_of(DECAY_SCHEDULES),
        "Follows the learning rate; or is constant, or decreases linearly, from its peak.",
    ),
    Key("optimizer.weight_decay_schedule.final_fraction", 0.0, FRACTION, "Final over initial (linear)."),
    Key(
        "optimizer.weight_decay_schedule.independent", False, ANY, "Does not multiply by the peak learning "
        "rate: at the peak, a step removes the fraction weight_decay of each weight.",
    ),
    Key(
        "optimizer.weight_decay_exempt", "", subset_of(EXEMPTIBLE), "Parameters "
        "without weight decay: embeddings, output matrix, vectors (norms and biases).",
    ),
    Key("optimizer.momentum", 0.95, BELOW_ONE, "Momentum of Muon."),
    Key("optimizer.beta1", 0.9, BELOW_ONE, "First-moment decay of AdamW."),
    Key("optimizer.beta2", 0.95, BELOW_ONE, "Second-moment decay of AdamW."),
    Key("optimizer.epsilon", 1e-8, POSITIVE, "Epsilon of AdamW."),
    Key("optimizer.max_grad_norm", 0.0, at_least(0), "Clips the norm of the whole gradient; 0: no clipping."),
    Key(
        "optimizer.schedule.name", "wsd", one_of(SCHEDULES),
        "Learning-rate schedule; see dualsm/optimizers/schedules.py.",
    ),
    Key("optimizer.schedule.warmup_steps", 0, at_least(0), "Steps of linear warmup."),
    Key("optimizer.schedule.decay_fraction", 0.25, FRACTION, "Last fraction of the steps (wsd, infinite)."),
    Key("optimizer.schedule.final_fraction", 0.0, at_least(0), "Final over peak learning rate."),
    Key("optimizer.schedule.cooldown_steps", 0, at_least(0), "Steps from peak to constant (infinite)."),
    Key("optimizer.schedule.constant_fraction", 0.5, at_least(0), "Constant over peak (infinite)."),

    Key("ema.decay", 0.0, BELOW_ONE, "Decay of the moving average of the weights; 0: no average."),
    Key("ema.start", 0, at_least(0), "Until this step the average equals the weights."),
    Key("ema.every", 1, at_least(1), "Steps between updates of the average."),

    Key("mesh.replica", 1, _AXIS, "Copies of the model across slices."),
    Key("mesh.data", -1, _AXIS, "Copies of the model that share the batch."),
    Key("mesh.fsdp", 1, _AXIS, "Devices that share the batch and shard the parameters."),
    Key("mesh.tensor", 1, _AXIS, "Devices that shard heads, MLP and vocabulary."),

    Key("start.run", "", ANY, "Fork this run directory: weights, optimizer state and step; empty: do not."),
    Key("start.step", -1, at_least(-1), "Checkpoint of start.run; -1: the newest, set by the run."),

    Key("checkpoint.every", 100, at_least(1), "Steps between checkpoints."),
    Key("checkpoint.max_to_keep", 2, at_least(1), "Number of newest checkpoints that are kept."),
    Key("checkpoint.max_failed_saves", 3, at_least(0), "Consecutive failed saves before the run stops."),
    Key("checkpoint.final_retries", 8, at_least(0), "Retries of the last save, after 1, 2, 4, ... seconds."),
    Key("checkpoint.keep_period", 0, at_least(0), "Also keep checkpoints at multiples of it; 0: none."),
    Key(
        "checkpoint.at_words", "", COUNTS, "Also save and keep checkpoints at these numbers of words, "
        "such as 1M,2M,10M; repeated words count each time.",
    ),

    Key(
        "valid.every", 100, at_least(1), "Steps between validations; new runs also validate before their "
        "first step, and all runs after their last.",
    ),
    Key(
        "valid.num_sequences", 1024, at_least(0), "Maximum number of held-out sequences per source; 0: "
        "all.",
    ),
    Key("valid.objectives", "causal,prefix,masked_diffusion", ANY, "Validated objectives; empty: none."),
    Key(
        "valid.parameters", "last", one_of(("last", "ema", "both")), "Validates the weights, their moving "
        "average (valid/ema/...), or both.",
    ),

    Key("log.every", 10, at_least(1), "Steps per log line; losses are means over these steps."),
    Key("log.tensorboard", True, ANY, "Write TensorBoard files."),
    Key("log.wandb", "", ANY, "Weights & Biases project; empty: off."),
]  # fmt: skip

# Keys that may change when a run is resumed, because they do not change what the model learns.
FREE_KEYS = (
    "checkpoint", "data.prefetch_steps", "data.path", "data.num_threads", "data.verify", "log.tensorboard",
    "log.wandb", "mesh", "per_device_batch_size", "gradient_accumulation_steps", "model.attention",
    "model.remat", "max_consecutive_skips", "valid.every", "sources.*.corpus",
)  # fmt: skip

# Keys that a run sets if they have these values.
FILLED_IN = {
    "data.identity": "", "sources.*.identity": "", "data.order_version": 0, "model.vocab_size": 0,
    "model.never_predicted": "", "start.step": -1,
}  # fmt: skip
