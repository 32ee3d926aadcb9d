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

EXTRAS = {
    "cuda": ["jax[cuda13]>=0.10,<0.13"],
    "eval": ["lm-eval>=0.4.8,<0.5"],
    "notebooks": ["ipykernel>=6", "ipywidgets>=8", "matplotlib>=3.8", "nbclient>=0.10"],
    "parquet": ["pyarrow>=15"],
    "test": ["pyarrow>=15", "pytest>=8,<10", "ruff>=0.8", "safetensors>=0.4,<1"],
    "tpu": ["jax[tpu]>=0.10,<0.13"],
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
    packages=find_packages(include=["dualsm", "dualsm.*"]),
    install_requires=CORE,
    extras_require=EXTRAS,
)
