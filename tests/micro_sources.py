"""A micro config with two sources; also a config file, `--config=tests/micro_sources.py:SMALL,LARGE`."""

from pathlib import Path

from dualsm.config import add_source
from tests.micro import micro_config


def two_sources(small: Path | str = "small", large: Path | str = "large"):
    """Returns a micro config: a quarter of the rows repeats `small`, with a mixture of its own."""
    config = micro_config()
    config.mixture.causal, config.mixture.prefix, config.mixture.masked_diffusion = 0.75, 0.0, 0.25
    mixture = {"causal": 0.5, "masked_diffusion": 0.5}
    add_source(config, "small", str(small), share=0.25, repetitions=4, mixture=mixture)
    add_source(config, "large", str(large), share=0.75, repetitions=1)
    return config


def get_config(arg: str = "small,large"):
    return two_sources(*arg.split(","))
