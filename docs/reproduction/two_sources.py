"""Two sources: 117,760 tokens of literature repeated 16 times, and other text, read once.

    python -m dualsm.train --config=docs/reproduction/two_sources.py:mixture=one --workdir=runs/one

The literature has one eighth of the 15.07M training tokens. Both mixtures train the same number of
masked sequences: "one" has 1/16 in both sources, "per_source" 1/2 of the literature and none elsewhere.
"""

from configs.starved import get_config as starved_config
from dualsm.config import add_source, parse_arg

# Share of causal sequences in the literature and in the other text.
MIXTURES = {"causal": (1.0, 1.0), "one": (15 / 16, 15 / 16), "per_source": (1 / 2, 1.0)}


def get_config(arg: str = ""):
    alphas = MIXTURES[parse_arg(arg, mixture=str).get("mixture", "per_source")]
    config = starved_config()
    config.data.path = ""
    for name, share, repetitions, alpha in zip(
        ("literature", "other"), (1 / 8, 7 / 8), (16, 1), alphas, strict=True
    ):
        mixture = {"causal": alpha, "masked_diffusion": 1 - alpha}
        corpus = f"runs/sources/{name}"
        add_source(config, name, corpus, share=share, repetitions=repetitions, mixture=mixture)
    return config
