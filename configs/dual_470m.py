"""The paper's model and recipe (arXiv 2512.14549): 470M parameters, 8,192 steps of 2,048 x 2,048 tokens.

    python -m dualsm.train --config=configs/dual_470m.py:alpha=0.75,repetitions=32 --workdir=runs/dual \\
        --config.data.path=corpora/hplt

`alpha` is the share of causal rows, `repetitions` is R. The paper uses 16 heads of size 64, half the width of
a TPU's matrix unit; `heads=8` sets the size to 128, with the same number of parameters. The released models
were trained with weight 2 on the causal loss; add --config.objectives.causal.weight=2.0 to reproduce them.
"""

from dualsm.config import default_config, parse_arg, set_alpha


def get_config(arg: str = ""):
    args = parse_arg(arg, alpha=float, repetitions=int, heads=int)
    config = default_config()
    config.steps = 8192
    config.batch_size = 2048
    config.seq_len = 2048  # 34 billion tokens in total; the paper's 32B are 32 * 2**30
    config.repetitions = args.get("repetitions", 1)
    set_alpha(config, args.get("alpha", 63 / 64))
    config.data.num_threads = 8

    config.model.num_layers = 24
    config.model.d_model = 1024
    config.model.num_heads = args.get("heads", 16)
    config.model.d_ff = 3554
    config.model.vocab_size = 51_200
    config.model.rope_theta = 160_000.0
    config.model.norm_eps = 1e-7
    config.model.dtype = "bfloat16"
    config.model.remat = "full"

    # Fits v5e chips with 16 GB, on slices of any size; see docs/scaling.md.
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.per_device_batch_size = 8
    config.loss.chunk_size = 1024  # its gradient is reduced over the chips once per chunk

    config.optimizer.learning_rate = 7e-3
    config.optimizer.weight_decay = 0.1
    config.optimizer.schedule.warmup_steps = 0
    config.optimizer.schedule.decay_fraction = 0.25
    config.loss.z_loss = 1e-4

    config.checkpoint.every = 256
    config.checkpoint.keep_period = 2048
    config.valid.every = 128
    config.valid.num_sequences = 1024
    return config
