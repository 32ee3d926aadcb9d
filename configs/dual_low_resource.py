"""A low-resource and a high-resource language: 100M unique tokens for 16 epochs, and 2B tokens for one.

    python -m dualsm.prepare --input='small/*.gz,large/*.gz' --output=corpora/both --vocab_size=32768
    for name in small large; do
        python -m dualsm.prepare --input="$name/*.gz" --output=corpora/$name \\
            --tokenizer=corpora/both/tokenizer.model
    done
    python -m dualsm.train --config=configs/dual_low_resource.py --workdir=runs/low_resource

The arguments `alpha` and `repetitions` apply to the small corpus, whose share is 4/9 of all rows; by default
half of its rows are masked diffusion. The large corpus is read once, with the paper's mixture for data that
is not repeated.
"""

from dualsm.config import add_source, default_config, parse_arg


def get_config(arg: str = ""):
    args = parse_arg(arg, alpha=float, repetitions=int)
    alpha = args.get("alpha", 1 / 2)
    config = default_config()
    config.steps = 3433
    config.batch_size = 512
    config.seq_len = 2048  # 3.6B tokens in total
    add_source(
        config,
        "small",
        "corpora/small",
        share=4 / 9,  # 1.6B tokens
        repetitions=args.get("repetitions", 16),
        mixture={"causal": alpha, "masked_diffusion": 1 - alpha},
    )
    add_source(
        config,
        "large",
        "corpora/large",
        share=5 / 9,  # 2B tokens
        repetitions=1,
        mixture={"causal": 63 / 64, "masked_diffusion": 1 / 64},
    )
    config.data.num_threads = 8

    config.model.num_layers = 12
    config.model.d_model = 768
    config.model.num_heads = 6
    config.model.d_ff = 2048
    config.model.vocab_size = 32_768
    config.model.dtype = "bfloat16"
    config.model.remat = "full"

    config.mesh.data, config.mesh.fsdp = 1, -1
    config.per_device_batch_size = 16
    config.loss.chunk_size = 1024

    config.checkpoint.every = 256
    config.valid.every = 128
    return config
