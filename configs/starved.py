"""A model small enough to sweep on two cores: 0.2M parameters, 15M tokens (65 per parameter; the paper: 73).

python -m dualsm.prepare --input=text/train.jsonl.gz --valid_input=text/valid.jsonl \\
    --output=runs/english --vocab_size=512
python -m dualsm.sweep --config=configs/starved.py --workdir=runs/starved
python -m dualsm.train --config=configs/starved.py:alpha=0.125,repetitions=128 --workdir=runs/starved128
"""

from dualsm.config import default_config, parse_arg, set_alpha


def get_config(arg: str = ""):
    args = parse_arg(arg, alpha=float, repetitions=int)
    config = default_config()
    config.data.path = "runs/english"
    config.steps = 1840
    config.batch_size = 64
    config.seq_len = 128
    config.repetitions = args.get("repetitions", 1)
    set_alpha(config, args.get("alpha", 0.5))
    config.model.num_layers = 3
    config.model.d_model = 64
    config.model.num_heads = 2
    config.model.d_ff = 192
    config.model.rope_theta = 10_000.0
    config.optimizer.learning_rate = 1e-2
    config.checkpoint.every = 460
    config.checkpoint.max_to_keep = 1
    config.valid.every = 230
    config.valid.num_sequences = 1024
    config.log.every = 23
    config.log.tensorboard = False
    return config
