"""The demo: 1.4 million parameters, trained on the Python standard library in minutes on two cores.

python -m dualsm.prepare --input=python-stdlib --output=runs/corpus --vocab_size=2048
python -m dualsm.train --config=configs/tiny.py --workdir=runs/tiny
"""

from dualsm.config import default_config, parse_arg, set_alpha


def get_config(arg: str = ""):
    args = parse_arg(arg, alpha=float, repetitions=int)
    config = default_config()
    config.data.path = "runs/corpus"
    config.steps = 960
    config.batch_size = 16
    config.seq_len = 256
    # Two passes over two million unique tokens: an installation without Python's own tests has no more.
    config.repetitions = args.get("repetitions", 2)
    config.mixture.causal, config.mixture.prefix, config.mixture.masked_diffusion = 1 / 2, 1 / 4, 1 / 4
    if "alpha" in args:
        set_alpha(config, args["alpha"])
    config.model.num_layers = 4
    config.model.d_model = 128
    config.model.num_heads = 2
    config.model.d_ff = 384
    config.model.rope_theta = 10_000.0
    # Tuned for a few minutes on two cores: wider and deeper models, larger vocabularies and other learning
    # rates were worse.
    config.optimizer.learning_rate = 1e-2
    config.optimizer.schedule.decay_fraction = 0.5
    config.checkpoint.every = 120
    config.valid.every = 480
    config.log.every = 20
    return config
