"""The BabyLM challenge: 10 epochs over 10M words (track strict-small) or 100M words (strict).

python -m dualsm.prepare --input='train_10M/*.train' --valid_input='dev/*.dev' --vocab_size=8192 \\
    --output=runs/babylm_corpus
python -m dualsm.train --config=configs/babylm.py:corpus=runs/babylm_corpus --workdir=runs/babylm
python -m dualsm.convert export --format=huggingface --milestones --workdir=runs/babylm --output=exported

Arguments: `corpus`, whose size determines the number of steps (not --config.data.path, which comes too late);
`track=strict`, for a larger model and more milestones; `alpha` (default 15/16); `repetitions` (default 10).
See docs/babylm.md.
"""

from pathlib import Path

from dualsm.config import default_config, parse_arg, set_alpha
from dualsm.data.corpus import MANIFEST, Corpus
from dualsm.process.errors import UserError

EPOCHS = 10
TOKENS_PER_WORD = 1.35  # rough estimate, used until the corpus exists
WORDS = {"strict-small": 10_000_000, "strict": 100_000_000}
MILESTONES = [*range(1, 10), *range(10, 101, 10), *range(200, 1001, 100)]  # millions of words


def get_config(arg: str = ""):
    args = parse_arg(arg, track=str, corpus=str, alpha=float, repetitions=int)
    track = args.get("track", "strict-small")
    if track not in WORDS:
        raise UserError(f"--config: track={track} must be one of {', '.join(WORDS)}")
    is_small = track == "strict-small"
    config = default_config()
    config.data.path = args.get("corpus", "runs/babylm_corpus")
    config.repetitions = args.get("repetitions", EPOCHS)
    config.seq_len = 512
    config.batch_size = 32 if is_small else 256
    words, tokens = WORDS[track], int(WORDS[track] * TOKENS_PER_WORD)
    if "corpus" in args or Path(config.data.path, MANIFEST).exists():
        split = Corpus(config.data.path, "--config: corpus").manifest["splits"]["train"]
        words, tokens = split.get("words", words), split["tokens"]
    config.steps = max(config.repetitions * tokens // (config.batch_size * config.seq_len), 1)
    # At 10 epochs a few masked rows raise the causal loss only slightly and make the masked scores useful.
    set_alpha(config, args.get("alpha", 15 / 16))
    config.valid.every = 250

    config.model.num_layers = 12
    config.model.d_model = 384 if is_small else 768
    config.model.num_heads = 6 if is_small else 12
    config.model.d_ff = 1280 if is_small else 2560
    config.model.dtype = "bfloat16"

    config.checkpoint.every = 250
    reached = [m for m in MILESTONES if m * 1e6 <= config.repetitions * words]
    config.checkpoint.at_words = ",".join(f"{millions}M" for millions in reached)
    return config
