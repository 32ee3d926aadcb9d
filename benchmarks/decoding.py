"""Measures decoding: time per token with and without the cache, and speculative beside causal decoding.

    python benchmarks/decoding.py --workdir=runs/tiny

With the cache, the time per token is constant; without it, the time grows with the number of earlier tokens.
Speculative decoding starts from segments of held-out documents. `--drafts_without_cache` compares the
acceptance of drafts whose masks attend to the causal cache with that of drafts from a bidirectional pass.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from dualsm.config import freeze
from dualsm.evaluation.acceptance import SAMPLINGS
from dualsm.evaluation.held_out_prompts import held_out_prompts
from dualsm.generation import drafting
from dualsm.generation.autoregressive import DecodeState, decode, forward_with_cache, prefill
from dualsm.generation.draft_counts import DraftCounts
from dualsm.generation.generate import Throughput, generate
from dualsm.generation.prompt_batches import batch_slices, pad_batch, prompt_keys
from dualsm.generation.sampling_params import SamplingParams
from dualsm.generation.speculative import SpeculationParams
from dualsm.model.transformer import bind
from dualsm.process import cli
from dualsm.process.progress import say, table
from dualsm.rundir.trained_run import TrainedRun, open_run

_WORKDIR = cli.DEFINE_path("workdir", None, "run directory")
_POSITIONS = flags.DEFINE_list("positions", ["20", "200"], "positions in the text to measure at")
_REPEATS = flags.DEFINE_integer("repeats", 60, "measurements per position; results are medians")
_DATA = cli.DEFINE_path("data", "", "corpus with the held-out text; default: the run's own corpus")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8", "32"], "batch sizes of speculative decoding")
_DRAFTS = flags.DEFINE_list("drafts", ["0", "2", "4", "8"], "tokens per draft; 0: adapts")
_TOKENS_PER_TEXT = flags.DEFINE_integer("tokens", 128, "tokens to generate per text")
_RUNS = flags.DEFINE_integer("runs", 5, "runs per batch size and draft; speeds are medians")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "temperature of speculative decoding")
_WITHOUT_CACHE = flags.DEFINE_bool(
    "drafts_without_cache", False, "only compare drafts with and without the causal cache"
)
_OUTPUT = cli.DEFINE_path("output", "", "write the results to this JSON file")
flags.mark_flags_as_required(["workdir"])

_TOKENS = 8  # decoded per measurement, around the position


def cached(run: TrainedRun, positions: Sequence[int]) -> list[Callable[[], float]]:
    """Returns a function per position that decodes `_TOKENS` tokens and returns seconds per token."""
    special = dataclasses.replace(run.tokenizer.special, eos=-1)  # never stop at `</s>`
    config, length = freeze(run.config.model), np.ones(1, np.int32)
    prompt = np.array([[special.bos]], np.int32)
    more = functools.partial(
        decode, config, run.params, sampling=SamplingParams(temperature=0), special=special
    )

    def at(position: int) -> Callable[[], float]:
        state: DecodeState = prefill(
            config, run.params, prompt, length, prompt_keys(0, prompt),
            size=max(positions) + _TOKENS, bidirectional=False, special=special,
        )  # fmt: skip
        while int(state.length_B[0]) < position - _TOKENS // 2:
            state = more(state, steps=1)
        state = jax.device_get(state._replace(key_B=jax.random.key_data(state.key_B)))

        def measured() -> float:
            fresh = jax.tree.map(jnp.asarray, state)
            fresh = jax.block_until_ready(fresh._replace(key_B=jax.random.wrap_key_data(fresh.key_B)))
            start = time.perf_counter()
            jax.block_until_ready(more(fresh, steps=_TOKENS))
            return (time.perf_counter() - start) / _TOKENS

        return measured

    return [at(position) for position in positions]


def uncached(run: TrainedRun, positions: Sequence[int]) -> list[Callable[[], float]]:
    """Returns a function per position that runs the model on all earlier tokens and returns the seconds."""
    config = freeze(run.config.model)

    @jax.jit
    def last_logits(params, tokens_BxL):
        ends_BxL = jnp.arange(1, tokens_BxL.shape[1] + 1)[None]
        features_BxLxD = bind(config, params).features(tokens_BxL, jnp.zeros_like(tokens_BxL), ends_BxL)
        return bind(config, params).head.output(features_BxLxD[:, -1])

    def at(position: int) -> Callable[[], float]:
        tokens_BxL = jnp.full((1, position), run.tokenizer.special.bos, jnp.int32)

        def measured() -> float:
            start = time.perf_counter()
            jax.block_until_ready(last_logits(run.params, tokens_BxL))
            return time.perf_counter() - start

        return measured

    return [at(position) for position in positions]


def medians(functions: Sequence[Callable[[], float]]) -> list[float]:
    """Returns the median seconds of each function, measured in turn so that other load affects all alike."""
    for function in functions:
        function()  # compiles
    seconds = [[function() for function in functions] for _ in range(_REPEATS.value)]
    return np.median(seconds, axis=0).tolist()


def speeds(run: TrainedRun) -> list[dict]:
    """Measures causal and speculative decoding in turn, on the same prompts; returns one record for each."""
    sampling, records = SamplingParams(_TEMPERATURE.value), []
    sizes = [("causal", 0), *(("speculative", int(draft)) for draft in _DRAFTS.value)]
    for batch_size in map(int, _BATCH_SIZES.value):
        measured: dict[tuple[str, int], list[float]] = {size: [] for size in sizes}
        prompts = held_out_prompts(run, _DATA.value, batch_size, 32)
        for _ in range(_RUNS.value):
            for mode, draft in sizes:
                drafts = DraftCounts() if mode == "speculative" else None
                throughput = Throughput(mode, run.tokenizer.special.mask, drafts)
                for state in generate(
                    run, prompts, mode, _TOKENS_PER_TEXT.value, sampling, None, prompt_keys(0, prompts),
                    SpeculationParams(draft), drafts,
                ):  # fmt: skip
                    throughput.update(state)
                measured[mode, draft].append(throughput.tokens_per_second())
                if len(measured[mode, draft]) == 1:
                    record = {"batch_size": batch_size, "mode": mode, "draft": draft}
                    tokens = throughput.new_tokens
                    if drafts:
                        record["accepted_per_draft"] = drafts.accepted / drafts.drafts
                    record["tokens_per_forward"] = tokens / (2 * drafts.drafts) if drafts else 1.0
                    records.append(record)
        for record in records[-len(sizes) :]:
            record["tokens_per_second"] = float(np.median(measured[record["mode"], record["draft"]]))
    return records


def speed_table(records: Sequence[dict]) -> str:
    rows = []
    for record in records:
        if record["mode"] == "causal":
            base = record["tokens_per_second"]
        rows.append([
            record["batch_size"],
            record["mode"],
            {"causal": ""}.get(record["mode"], record["draft"] or "adapts"),
            f"{record['accepted_per_draft']:.2f}" if "accepted_per_draft" in record else "",
            f"{record['tokens_per_forward']:.2f}",
            f"{record['tokens_per_second']:.0f}",
            f"{record['tokens_per_second'] / base:.2f}",
        ])  # fmt: skip
    header = [
        "batch size",
        "mode",
        "draft",
        "accepted",
        "tokens per forward",
        "tokens per second",
        "relative",
    ]
    return table(header, rows)


def drafts_with_and_without_cache(run: TrainedRun, size: int = 8, count: int = 512) -> list[dict]:
    """Returns the expected accepted tokens of drafts of both forms, after the same held-out prompts.

    Without the cache, one bidirectional forward pass runs on the text and `size` - 1 masks after it.
    """
    config, special = freeze(run.config.model), run.tokenizer.special

    @functools.partial(jax.jit, static_argnames=("sampling", "cached"))
    def accepted(params, state: DecodeState, *, sampling: SamplingParams, cached: bool):
        model, length_B, offset_P = bind(config, params), state.length_B, jnp.arange(size)
        rows, size_B = jnp.arange(len(length_B)), jnp.full_like(length_B, size)
        position_BxP = length_B[:, None] - 1 + offset_P
        if cached:
            last_B = state.tokens_BxS[rows, length_B - 1]
            features_BxPxD, _ = drafting.draft_features(
                model, last_B, length_B, size_B, state.cache, size=size, mask=special.mask
            )
        else:
            place_S, end_Bx1 = jnp.arange(state.tokens_BxS.shape[1]), length_B[:, None] + size - 1
            is_mask_BxS = (place_S >= length_B[:, None]) & (place_S < end_Bx1)
            tokens_BxS = jnp.where(is_mask_BxS, special.mask, state.tokens_BxS)
            start_BxS = jnp.zeros_like(tokens_BxS)
            features_BxSxD = model.features(tokens_BxS, start_BxS, start_BxS + end_Bx1)
            features_BxPxD = jnp.take_along_axis(features_BxSxD, position_BxP[..., None], axis=1)
        key_BxP = drafting.position_keys(state.key_B, position_BxP, 0)
        log_q_BxPxV = drafting.log_distributions(model, features_BxPxD, sampling, special)
        draft = drafting.draw_draft(log_q_BxPxV, size_B, key_BxP, sampling)
        log_p_BxP1xV, _ = drafting.verify(model, draft, length_B, state.cache, sampling, special)
        if not cached:  # the first token of this draft is not exact, so it is verified like the others
            last_Bx1 = state.tokens_BxS[rows, length_B - 1][:, None]
            features_Bx1xD, _ = forward_with_cache(model, last_Bx1, length_B - 1, None, state.cache)
            first_Bx1xV = drafting.log_distributions(model, features_Bx1xD, sampling, special)
            log_p_BxP1xV = log_p_BxP1xV.at[:, :1].set(first_Bx1xV)
        return jnp.exp(jnp.cumsum(drafting.log_acceptance(draft, log_p_BxP1xV), axis=1))

    records = []
    prompts = held_out_prompts(run, _DATA.value, count, run.config.seq_len // 2)
    for cached in (True, False):
        for name, sampling in SAMPLINGS.items():
            parts = []
            for part in batch_slices(count, run.config.seq_len):
                prompts_BxP, prompt_B = pad_batch(prompts[part], special.pad)
                state = prefill(
                    config, run.params, prompts_BxP, prompt_B, prompt_keys(0, prompts[part]),
                    size=prompts_BxP.shape[1] + size, bidirectional=False, special=special,
                )  # fmt: skip
                parts.append(jax.device_get(accepted(run.params, state, sampling=sampling, cached=cached)))
            accepted_NxP = np.concatenate(parts)
            total_N = accepted_NxP.sum(1)
            records.append({
                "cache": cached, "sampling": name, "accepted": float(total_N.mean()),
                "stderr": float(total_N.std() / count**0.5), "by_position": accepted_NxP.mean(0).tolist(),
            })  # fmt: skip
    return records


def draft_table(records: Sequence[dict]) -> str:
    rows = [
        [
            "causal cache" if record["cache"] else "bidirectional pass",
            record["sampling"],
            f"{record['accepted']:.3f} ± {record['stderr']:.3f}",
            *(f"{x:.3f}" for x in record["by_position"][:3]),
        ]
        for record in records
    ]
    return table(["draft", "sampling", "accepted", "first", "second", "third"], rows)


def times(run: TrainedRun) -> tuple[dict, str]:
    """Measures the time per token early and late in a text; returns it with a table."""
    positions = [int(position) for position in _POSITIONS.value]
    both = {"with cache": cached, "without cache": uncached}
    results = {name: medians(make(run, positions)) for name, make in both.items()}
    rows = [
        [name, *(f"{1000 * s:.2f}" for s in seconds), f"{seconds[-1] / seconds[0]:.2f}"]
        for name, seconds in results.items()
    ]
    header = ["ms per token at position", *map(str, positions), f"{positions[-1]} over {positions[0]}"]
    return {"positions": positions, "seconds": results}, table(header, rows)


def main(_: Sequence[str]) -> None:
    cli.set_up_jax()
    run = open_run(_WORKDIR.value)
    content = {"workdir": str(run.workdir)}
    if _WITHOUT_CACHE.value:
        content["drafts"] = drafts_with_and_without_cache(run)
        say(draft_table(content["drafts"]))
    else:
        seconds, text = times(run)
        say(text)
        content |= seconds | {"speeds": speeds(run)}
        say(speed_table(content["speeds"]))
    say(f"load {os.getloadavg()[0]:.1f}")
    if _OUTPUT.value:
        Path(_OUTPUT.value).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
