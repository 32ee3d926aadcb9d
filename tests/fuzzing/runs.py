"""Fuzzing targets: tokenizers, prompts, sweeps, released weights and run directories."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax

from dualsm import config as configs
from dualsm.analysis.advice import advise, round_repetitions
from dualsm.analysis.advice_text import describe
from dualsm.analysis.table import load, write_table
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.devices.sharding import make_mesh
from dualsm.exchange import import_reference, imported_run, reference_format
from dualsm.exchange.weight_files import write_safetensors
from dualsm.generation.prompts import encode_prompt, read_prompts
from dualsm.rundir.metrics import METRICS, read_metrics
from dualsm.rundir.trained_run import open_run
from dualsm.training.program import compile_train_step
from tests.analysis.synthetic import grid, write_sweep
from tests.exchange.conftest import make_tokenizer_json
from tests.fuzzing.artifacts import TEXT, Target, files_of, jsonl
from tests.micro import micro_config


def targets(corpus: Path, texts: list[str], scratch: Path) -> dict[str, Target]:
    """Returns the targets; builds their files in the folder `scratch`."""
    tokenizer, foreign = corpus / "tokenizer.model", make_tokenizer_json(texts, seed=0).encode()
    prompts = jsonl([{"prompt": "a <mask:3> b"}, {"prompt": TEXT}])
    sweep = write_sweep(scratch / "sweep", grid((1, 16), (0.0, 0.5, 1.0)), missing=("later",))
    write_table(scratch / "table.csv", load(sweep))
    run = make_run(corpus, scratch / "run")
    tensors = reference_format.from_params(jax.device_get(open_run(run).params))
    write_safetensors(scratch / "model.safetensors", tensors, {})
    released = {
        "model.safetensors": (scratch / "model.safetensors").read_bytes(),
        "tokenizer.json": foreign,
        "config.json": json.dumps({"num_attention_heads": 2, "norm_eps": 1e-7}).encode(),
    }
    return {
        "tokenizer.model": Target({"t": tokenizer.read_bytes()}, _use_tokenizer),
        "tokenizer.json": Target({"t": foreign}, _use_tokenizer),
        "prompts": Target({"p.jsonl": prompts}, _prompter(tokenizer)),
        "table of a sweep": Target(
            {"table.csv": (scratch / "table.csv").read_bytes()}, _ask_table, share=0.1
        ),
        "folder of a sweep": Target(files_of(sweep), _ask, share=0.1),
        "released weights": Target(released, _import),
        "run": Target(files_of(run), _use_run, share=0.5),
    }


def make_run(corpus: Path, workdir: Path) -> Path:
    """Writes a run directory with the checkpoint of an untrained model."""
    tokenizer = load_tokenizer(str(corpus / "tokenizer.model"))
    config = micro_config(corpus)
    config.model.vocab_size, config.model.num_layers = tokenizer.vocab_size, 1
    config.model.d_model, config.model.d_ff = 8, 16
    mesh = make_mesh(configs.default_config().mesh, jax.devices())
    params = jax.device_get(compile_train_step(config, tokenizer.special, mesh).init().params)
    imported_run.write_run(config, params, tokenizer, workdir, {"format": "none"})
    (workdir / METRICS).write_bytes(jsonl({"step": n, "train/loss": 5.0} for n in range(4)))
    return workdir


def _use_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder / "t"))
    for tokens in tokenizer.encode([TEXT, "", "def f(x):"]):
        assert all(0 <= token < tokenizer.vocab_size for token in tokens)
        tokenizer.decode(tokens)
    assert len(tokenizer.token_bytes()) == tokenizer.vocab_size
    for token in range(min(tokenizer.vocab_size, 400)):
        tokenizer.piece(token)


def _prompter(tokenizer: Path) -> Callable[[Path], None]:
    def use(folder: Path) -> None:
        for prompt in read_prompts(str(folder / "p.jsonl")):
            encode_prompt(load_tokenizer(str(tokenizer)), prompt)

    return use


def _ask_table(folder: Path) -> None:
    _ask(folder / "table.csv")


def _ask(source: Path) -> None:
    token_budget = round_repetitions(1e6, 8e6)
    answers = advise(token_budget.repetitions, source)
    assert all(0 <= advice.alpha <= 1 for advice in answers)
    describe(token_budget, answers, str(source))


def _import(folder: Path) -> None:

    with mock.patch.object(imported_run, "write_run") as write:  # `write_run` would compile
        import_reference.load(folder / "model.safetensors", "", None, folder / "run")
    assert write.called


def _use_run(folder: Path) -> None:

    read_metrics(folder)
    run = open_run(folder)
    assert run.params["embedding"]["embedding"].shape[0] == run.config.model.vocab_size
