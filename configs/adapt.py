"""Continues the training of an imported checkpoint on causal and masked-diffusion sequences.

python -m dualsm.convert import --format=huggingface --weights=SmolLM2-135M --workdir=runs/imported
python -m dualsm.prepare --input='texts/*.jsonl' --output=runs/adapt_corpus \\
    --tokenizer=runs/imported/tokenizer.model
python -m dualsm.train --config=configs/adapt.py:run=runs/imported --workdir=runs/adapted

`run` (default: runs/imported) is the imported run; the config takes its architecture.
`--config.start.run=''` trains the same architecture from random weights.
"""

from pathlib import Path

from dualsm.config import default_config, parse_arg, set_alpha
from dualsm.rundir.workdir import CONFIG, read_config


def get_config(arg: str = ""):
    args = parse_arg(arg, run=str, alpha=float, repetitions=int)
    config = default_config()
    config.start.run = args.get("run", "runs/imported")
    if "run" in args or Path(config.start.run, CONFIG).exists():
        config.model = read_config(config.start.run).model
    config.data.path = "runs/adapt_corpus"
    config.steps = 1000
    config.batch_size = 32
    config.seq_len = 512
    config.repetitions = args.get("repetitions", 1)
    set_alpha(config, args.get("alpha", 0.75))
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-4
    config.optimizer.weight_decay_exempt = "embeddings,vectors"
    config.optimizer.max_grad_norm = 1.0
    config.optimizer.schedule.name = "cosine"
    config.optimizer.schedule.warmup_steps = 50
    config.optimizer.schedule.final_fraction = 0.1
    config.loss.z_loss = 0.0  # the logits of a checkpoint trained without it have another normalizer
    config.valid.objectives = "causal,masked_diffusion"
    config.valid.num_sequences = 256
    return config
