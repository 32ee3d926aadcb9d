"""The demo: a model of a million parameters on the Python standard library, on two cores, in minutes.

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
    # Two million unique tokens, twice: a Python installed without its own tests has no more.
    config.repetitions = args.get("repetitions", 2)
    config.mixture.causal, config.mixture.prefix, config.mixture.masked_diffusion = 1 / 2, 1 / 4, 1 / 4
    if "alpha" in args:
        set_alpha(config, args["alpha"])
    config.model.num_layers = 4
    config.model.d_model = 128
    config.model.num_heads = 2
    config.model.d_ff = 384
    config.model.rope_theta = 10_000.0
    # Tuned on two cores for these minutes: wider, deeper, larger vocabularies and other rates came out worse.
    config.optimizer.learning_rate = 1e-2
    config.optimizer.schedule.decay_fraction = 0.5
    config.checkpoint.every = 120
    config.valid.every = 480
    config.log.every = 20
    return config
