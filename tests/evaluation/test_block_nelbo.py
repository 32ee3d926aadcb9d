"""The change of the held-out NELBO by block-causal attention, and when it matters."""

import jax
import pytest

from dualsm.data.corpus import Corpus
from dualsm.devices import sharding
from dualsm.evaluation.block_nelbo import block_nelbo, describe_block_nelbo
from dualsm.generation.generate import generate, why_cache_is_approximate
from dualsm.model.transformer import init_params
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import TrainedRun


@pytest.fixture
def run(micro, tmp_path):
    """Returns a run of a model that is not trained, whose predictions depend on all tokens that it sees."""
    corpus = Corpus(micro.data.path)
    micro.model.vocab_size = corpus.vocab_size
    params = init_params(micro.model, jax.random.key(0))
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)
    mesh = sharding.make_mesh(micro.mesh, jax.devices()[:1])
    return TrainedRun(tmp_path, micro, corpus.tokenizer(), 0, params, mesh)


def test_change_of_the_nelbo(run):
    length = run.config.seq_len
    whole, blocked = block_nelbo(run, length)
    assert whole == blocked  # the same masks
    same, causal = block_nelbo(run, 1)
    assert same == whole
    assert abs(causal - whole) > 1e-3
    assert run.config.objectives.block_diffusion.block == 32
    assert f"{causal:.3f} nats per token with blocks of 1, {whole:.3f}" in describe_block_nelbo(run, 1)
    run.config.data.path = "nowhere"
    assert "was not measured" in describe_block_nelbo(run, 1)


def test_the_cache_is_exact_only_for_blocks_of_the_training(run):
    assert "not trained with block_diffusion" in why_cache_is_approximate(run, 32)
    config = run.config
    config.mixture.masked_diffusion, config.mixture.block_diffusion = 0.0, 0.25
    assert why_cache_is_approximate(run, 32) is None
    assert "block=32" in why_cache_is_approximate(run, 16)
    config.objectives.block_diffusion.block = 0
    assert [block for block in range(1, 70) if not why_cache_is_approximate(run, block)] == [
        1,
        2,
        4,
        8,
        16,
        32,
    ]
    config.objectives.block_diffusion.form = "tail"
    assert "form=tail" in why_cache_is_approximate(run, 32)


def test_a_cache_is_rejected_in_other_modes(run):
    with pytest.raises(UserError, match="cache=True has no effect in mode causal"):
        generate(run, [[2]], "causal", 4, None, cache=True)
