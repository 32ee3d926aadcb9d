"""A config that compiles in seconds; also a config file, `--config=tests/micro.py:CORPUS`."""

from pathlib import Path

from dualsm.config import default_config


def micro_config(path: Path | str = ""):
    """Returns a config that compiles in seconds, with three objectives."""
    config = default_config()
    config.data.path = str(path)
    config.steps, config.batch_size, config.seq_len = 12, 8, 32
    config.mixture.causal, config.mixture.prefix, config.mixture.masked_diffusion = 0.5, 0.25, 0.25
    config.model.num_layers, config.model.d_model, config.model.num_heads, config.model.d_ff = 2, 32, 2, 64
    config.loss.chunk_size = 16
    config.log.every, config.valid.every, config.checkpoint.every = 2, 6, 4
    config.valid.num_sequences = 16
    config.log.tensorboard = False
    config.mesh.data = 1
    return config


def get_config(path: str = ""):
    return micro_config(path)
