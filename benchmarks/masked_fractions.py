"""Measures held-out losses with standard errors, also those of masked tokens at a fixed masked fraction.

    python benchmarks/masked_fractions.py --workdir=runs/adapted --data=runs/adapt_corpus --fractions=0.15

`python -m dualsm.evaluate --tasks=valid` reports the NELBO, an average over all masked fractions. Here a
sequence has a fixed fraction of its tokens masked, at random positions. Sequences and masks are the same for
all runs, and `--output` contains the sums of each sequence, so that two runs can be compared in pairs.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dualsm.devices.sharding import batch_devices, shard_batch
from dualsm.evaluation.held_out import open_held_out
from dualsm.evaluation.scoring import scoring_batch_size
from dualsm.model import transformer
from dualsm.objectives import mixture
from dualsm.objectives.example import Row
from dualsm.objectives.registry import OBJECTIVES
from dualsm.process import cli
from dualsm.process.errors import UserError
from dualsm.process.output import check_output, write_output
from dualsm.process.paths import user_path
from dualsm.process.progress import bar, say, table
from dualsm.rundir.trained_run import TrainedRun, open_run
from dualsm.training.objective_loss import example_loss
from dualsm.training.valid_rows import ValidRows, valid_rows

_SEED = 0  # of the masks

_WORKDIR = cli.DEFINE_path("workdir", None, "run directory")
_DATA = cli.DEFINE_path("data", None, "corpus with the held-out text")
_FRACTIONS = flags.DEFINE_list("fractions", ["0.15"], "masked fractions")
_SEQ_LEN = flags.DEFINE_integer("seq_len", 512, "tokens per sequence", lower_bound=2)
_SEQUENCES = flags.DEFINE_integer("sequences", 0, "maximum number of sequences; 0: all", lower_bound=0)
_SAMPLES = flags.DEFINE_integer("samples", 4, "draws of the masks per sequence", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "type of the computation")
_OUTPUT = cli.DEFINE_path("output", "", "write the results to this JSON file")
flags.mark_flags_as_required(["workdir", "data"])


def make_score(run: TrainedRun, cases: Sequence[tuple[str, Mapping]]) -> Callable:
    """Returns a jitted function that sums the loss of each sequence under one of several objectives.

    Args:
      run: the run.
      cases: name and options of each objective.

    Returns:
      A function (params, tokens_BxL1, documents_BxL1, index_B, total, case) -> (nll_B, loss_denominator_B)
      for the sequences `index_B` of `total`, under the objective `cases[case]`.
    """
    special = run.tokenizer.special
    objectives = [functools.partial(OBJECTIVES[name], special=special, **options) for name, options in cases]

    @jax.jit
    def score(params, tokens_BxL1, documents_BxL1, index_B, total, case):
        keys_B = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(_SEED), i))(index_B)
        zeros_B = jnp.zeros_like(index_B)
        row = Row(tokens_BxL1, documents_BxL1, index_B, zeros_B + total, zeros_B.astype(jnp.float32))
        example = mixture.make_examples(objectives, row, zeros_B + case, keys_B)
        stats = example_loss(transformer.bind(run.config.model, params), example, chunk=128)[2]
        return stats.nll_B, stats.loss_denominator_B

    return score


def losses(run: TrainedRun, rows: ValidRows, cases: Mapping[str, tuple[str, Mapping, int]]) -> dict:
    """Returns the loss of each objective, its standard error over sequences, and the sums of each sequence.

    Args:
      run: the run.
      rows: held-out sequences.
      cases: label -> name of the objective, its options, and number of draws per sequence.
    """
    score, results = make_score(run, [case[:2] for case in cases.values()]), {}
    count, length = len(rows.tokens_VxL1), rows.tokens_VxL1.shape[1] - 1
    size = min(scoring_batch_size(run.mesh, length), batch_devices(run.mesh) * count)
    for case, (label, (_, _, samples)) in enumerate(cases.items()):
        total, parts = count * samples, []
        with jax.set_mesh(run.mesh):
            for first in bar(iterable=range(0, total, size), desc=label):
                index_B = (first + np.arange(size, dtype=np.int32)) % total
                batch = rows.tokens_VxL1[index_B % count], rows.documents_VxL1[index_B % count], index_B
                sharded = (shard_batch(run.mesh, a) for a in batch)
                parts.append(score(run.params, *sharded, np.int32(total), np.int32(case)))
                jax.block_until_ready(parts[-4:][0])
        arrays = (np.concatenate(part)[:total] for part in zip(*jax.device_get(parts), strict=True))
        nll_V, tokens_V = (a.astype(np.float64).reshape(samples, count).sum(0) for a in arrays)
        loss, stderr = ratio(nll_V, tokens_V)
        results[label] = {
            "nats_per_token": loss,
            "stderr": stderr,
            "nll": [round(x, 3) for x in nll_V.tolist()],
            "tokens": tokens_V.tolist(),
        }
    return results


def ratio(sum_V: np.ndarray, count_V: np.ndarray) -> tuple[float, float]:
    """Returns sum / count over all sequences, and its standard error with sequences as the units."""
    mean, size = sum_V.sum() / count_V.sum(), len(sum_V)
    residual_V = sum_V - mean * count_V
    return float(mean), float(np.sqrt((residual_V**2).sum() * size / max(size - 1, 1)) / count_V.sum())


def main(_: Sequence[str]) -> None:
    cli.set_up_jax()
    try:
        fractions = [float(text) for text in _FRACTIONS.value]
    except ValueError:
        fractions = [math.nan]
    if not all(0 < fraction < 1 for fraction in fractions):
        raise UserError(
            f"--fractions={','.join(_FRACTIONS.value)}: must be numbers between 0 and 1, such as 0.15,0.5"
        )
    if _OUTPUT.value:
        check_output(user_path(_OUTPUT.value), "--output")
    run = open_run(_WORKDIR.value)
    (source,) = open_held_out(run, _DATA.value)
    run.config.model.dtype = _DTYPE.value
    rows = valid_rows(
        source.corpus.documents("valid"),
        _SEQ_LEN.value,
        _SEQUENCES.value,
        run.tokenizer.special,
        run.tokenizer.token_bytes(),
    )
    cases = {"causal": ("causal", {}, 1), "masked_diffusion": ("masked_diffusion", {}, _SAMPLES.value)}
    for fraction in fractions:
        options = {"low": fraction, "high": fraction}
        cases[f"masked at {fraction:g}"] = ("variable_length_masked", options, _SAMPLES.value)
    results = losses(run, rows, cases)
    say(f"{_WORKDIR.value}, step {run.step}: {len(rows[0])} held-out sequences of {_SEQ_LEN.value} tokens")
    say(
        table(
            ["objective", "nats per token", "standard error"],
            [[name, f"{r['nats_per_token']:.4f}", f"{r['stderr']:.4f}"] for name, r in results.items()],
        )
    )
    if _OUTPUT.value:
        found = {"workdir": _WORKDIR.value, "checkpoint": run.step, "dtype": _DTYPE.value, "losses": results}
        write_output(user_path(_OUTPUT.value), json.dumps(found) + "\n", "--output")


if __name__ == "__main__":
    cli.run(main)
