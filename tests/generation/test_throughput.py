"""Tokens per second of generation exclude compilation and the time in which the texts are drawn."""

import itertools
from types import SimpleNamespace

import pytest

from dualsm.generation import generate, prompt_batches
from dualsm.generation.diffusion import UnmaskingParams, infill, unmask
from dualsm.generation.generate import Throughput
from dualsm.generation.sampling_params import SamplingParams
from dualsm.objectives.example import SpecialIds

SPECIAL = SpecialIds()


@pytest.mark.parametrize(("num_texts", "steps"), [(1, 1), (3, 4)])
def test_unmasking_compiles_each_batch_before_its_first_state(memorized, monkeypatch, num_texts, steps):
    """A forward pass takes one second here, and compilation 1,000 seconds. Three texts are two batches."""
    monkeypatch.setattr(prompt_batches, "MAX_BATCH_TOKENS", 70)  # two texts of 33 tokens
    seconds, before = itertools.count(), unmask._cache_size()
    clock = SimpleNamespace(perf_counter=lambda: 1000 * unmask._cache_size() + next(seconds))
    monkeypatch.setattr(generate, "time", clock)
    text = [*memorized.text[:5], *[SPECIAL.mask] * 8, *memorized.text[13:]]
    # Used in no other test and no other case, so that each case compiles.
    sampling = SamplingParams(temperature=0.5 + 0.01 * num_texts)
    throughput = Throughput("diffusion", SPECIAL.mask)
    for texts in infill(
        memorized.config,
        memorized.params,
        [text] * num_texts,
        sampling,
        UnmaskingParams(steps=steps),
        SPECIAL,
    ):
        throughput.update(texts)
    num_batches = -(-num_texts // 2)
    assert unmask._cache_size() == before + num_batches
    assert throughput.tokens_per_second() == 8 * num_texts / (steps * num_batches)


def test_time_between_update_and_resume_is_excluded(monkeypatch):
    now = iter([0, 10, 11, 30, 32])
    monkeypatch.setattr(generate, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    throughput = Throughput("causal", SPECIAL.mask)
    throughput.update([[2]])
    throughput.resume()
    throughput.update([[2, 20]])
    throughput.resume()
    throughput.update([[2, 20, 21]])
    assert throughput.tokens_per_second() == 2 / 3
