"""A model of 7 billion parameters for a v5p slice of 512 chips: 16,384 steps of 2,048 x 2,048 tokens.

    python -m dualsm.compile --config=configs/dual_7b.py --topology=v5p:8x8x8
    python -m dualsm.train --config=configs/dual_7b.py:alpha=0.75,repetitions=32 --workdir=gs://B/runs/7b \\
        --config.data.path=corpora/hplt

The model has the dimensions of Llama 7B. The remat policy and the mesh are the best ones of the compile
reports in docs/scaling.md.
"""

from dualsm.config import default_config, parse_arg, set_alpha


def get_config(arg: str = ""):
    args = parse_arg(arg, alpha=float, repetitions=int)
    config = default_config()
    config.steps = 16_384
    config.batch_size = 2048
    config.seq_len = 2048  # 69 billion tokens in total
    config.repetitions = args.get("repetitions", 1)
    set_alpha(config, args.get("alpha", 63 / 64))
    config.data.num_threads = 8

    config.model.num_layers = 32
    config.model.d_model = 4096
    config.model.num_heads = 32
    config.model.d_ff = 11_008
    config.model.vocab_size = 51_200
    config.model.dtype = "bfloat16"
    config.model.remat = "matmuls"  # needs 28 of the 96 GiB of a chip
    config.mesh.data, config.mesh.fsdp = (
        8,
        -1,
    )  # 64 rows of each matrix per chip; with fewer, gathering costs 1.4 times as much
    config.per_device_batch_size = 4
    config.loss.chunk_size = 1024  # its gradient is reduced over the chips once per chunk

    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule.warmup_steps = 200
    config.checkpoint.every = 256
    config.checkpoint.keep_period = 2048
    config.valid.every = 256
    config.valid.num_sequences = 2048
    return config
