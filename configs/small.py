"""A model of about 27 million parameters that trains on one GPU or TPU chip within hours.

python -m dualsm.prepare --input='data/*.jsonl.zst' --output=runs/text --vocab_size=16384
python -m dualsm.train --config=configs/small.py --workdir=runs/small --config.data.path=runs/text
python -m dualsm.train --config=configs/small.py:alpha=0.5,repetitions=16 --workdir=runs/small16 ...
"""

from dualsm.config import default_config, parse_arg, set_alpha


def get_config(arg: str = ""):
    args = parse_arg(arg, alpha=float, repetitions=int)
    config = default_config()
    config.steps = 4096
    config.batch_size = 256
    config.seq_len = (
        1024  # 1.07 billion tokens in total, 40 per parameter: about 4 GB of text, or less with repetitions
    )
    config.repetitions = args.get("repetitions", 1)
    config.mixture.causal, config.mixture.prefix, config.mixture.masked_diffusion = 0.5, 0.25, 0.25
    if "alpha" in args:
        set_alpha(config, args["alpha"])
    config.data.num_threads = 4

    config.model.num_layers = 8
    config.model.d_model = 384
    config.model.num_heads = 6
    config.model.d_ff = 1024
    config.model.dtype = "bfloat16"
    config.per_device_batch_size = 64  # fits a v5e chip with 16 GB

    config.optimizer.schedule.warmup_steps = 100
    config.checkpoint.every = 512
    config.valid.every = 256
    config.valid.num_sequences = 512
    return config
