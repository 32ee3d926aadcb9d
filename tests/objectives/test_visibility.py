"""Attention pattern of every objective, measured by gradients through the model, not read from key ranges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.model.transformer import bind
from dualsm.objectives.example import document_spans, single_row
from dualsm.objectives.registry import OBJECTIVES

from .conftest import SPECIAL, batch, packed, rewritten

ROWS, ROW_TOKENS = 32, 24
LAYOUTS = {
    "one document": [40],
    "several": [5, 1, 9, 30],
    "starts and ends at the borders": [7, 17, 1],
    "with filling": [6, 8],
}


@pytest.fixture(scope="module")
def influence(model_config, params):
    """Returns a function from an example to a bool matrix: the features at i depend on the input at j."""

    @jax.jit
    def gradients(inputs_L, start_L, end_L):
        def features(embeddings_LxD):
            model = bind(model_config, params)
            model.embedding = lambda _: embeddings_LxD
            features_1xLxD = model.features(inputs_L[None], start_L[None], end_L[None])
            return features_1xLxD[0] @ jnp.linspace(0.5, 1.5, model_config.d_model)

        return jax.jacrev(features)(bind(model_config, params).embedding(inputs_L))

    def matrix(example) -> np.ndarray:
        gradients_LxLxD = gradients(example.inputs_L, example.key_start_L, example.key_end_L)
        return np.abs(gradients_LxLxD).max(-1) > 0

    return matrix


def cases():
    blocks = {"block": 4}, {"block": 4, "form": "tail"}
    for name, options in [*((name, {}) for name in OBJECTIVES), *(("block_diffusion", o) for o in blocks)]:
        for layout in LAYOUTS:
            yield pytest.param(
                name, options, layout, id="-".join([name, *map(str, options.values()), layout])
            )


@pytest.mark.parametrize(("name", "options", "layout"), cases())
def test_positions_attend_exactly_to_the_view_of_the_objective(name, options, layout, influence):
    tokens_L1, documents_L1 = packed(LAYOUTS[layout], ROW_TOKENS)
    rows = batch([(tokens_L1, documents_L1)] * ROWS)
    examples = rewritten(name, rows, **options)
    for b in range(0, ROWS, 10):  # rows of different strata
        example = jax.tree.map(lambda a, b=b: a[b], examples)
        seen_LxL = influence(example)
        documents_L = documents_L1[:-1]
        for document in set(documents_L.tolist()):
            inside = np.flatnonzero(documents_L == document)
            others = np.flatnonzero(documents_L != document)
            assert not seen_LxL[np.ix_(inside, others)].any(), "another document is seen"
            view = seen_LxL[np.ix_(inside, inside)]
            if document >= 0:
                check_view(name, view, example.weights_L[inside], **options)


def check_view(
    name: str, seen: np.ndarray, weights: np.ndarray, block: int = 32, form: str = "noisy"
) -> None:
    """Checks the attention pattern within one document, given its loss weights."""
    n = len(seen)
    causal = np.tri(n, dtype=bool)
    view = OBJECTIVES[name].view
    if view == "block" and form == "noisy":
        index = np.arange(n) // block
        assert (seen == (index[:, None] >= index)).all()
    elif view == "block":
        scored = np.flatnonzero(weights)
        masks = scored[1:]  # the last token before the block predicts its first token
        assert len(scored) <= block
        expected = causal.copy()
        expected[np.ix_(masks, masks)] = True
        assert (seen == expected).all()
    elif view == "causal":
        assert (seen == causal).all()
    elif view == "document":
        assert seen.all()
    else:
        prefix = int(seen[0].sum())  # the first position attends to the prefix only
        assert 1 <= prefix <= n
        assert (seen == (causal | (np.arange(n) < prefix))).all()
        scored = np.flatnonzero(weights)
        if len(scored):
            # The last position of the prefix predicts the first token after it. In span denoising, this token
            # is the sentinel of the first span, which has no loss.
            assert scored[0] in ((prefix - 1,) if name == "prefix" else (prefix - 1, prefix))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_documents_contain_only_their_own_tokens(name):
    """Inputs and scored targets use the alphabet of their document; no two documents share a token."""
    tokens_L1, documents_L1 = packed([8, 1, 9, 3], ROW_TOKENS)
    alphabet_L1 = 16 + 8 * documents_L1
    tokens_L1 = np.where(tokens_L1 < 16, tokens_L1, alphabet_L1 + tokens_L1 % 8)
    own = {"random": 0.0} if name == "masked" else {}  # random tokens are drawn from the whole vocabulary
    example = rewritten(name, batch([(tokens_L1, documents_L1)] * ROWS), **own)
    text_BxL = example.inputs_L >= 16
    own_BxL = np.tile(alphabet_L1[:-1] // 8, (ROWS, 1))
    assert text_BxL.any()
    assert (example.inputs_L // 8 == own_BxL)[text_BxL].all()
    scored_BxL = (example.weights_L > 0) & (example.targets_L >= 16)
    assert scored_BxL.any()
    assert (example.targets_L // 8 == own_BxL)[scored_BxL].all()
    start_L, end_L = (np.asarray(a) for a in document_spans(jnp.asarray(documents_L1[:-1])))
    assert (example.key_start_L == start_L).all()
    assert (example.key_end_L <= end_L).all()


def test_causal_outputs_do_not_depend_on_the_future(model_config, params):
    """Changes later tokens instead of taking gradients."""
    tokens_L1, documents_L1 = packed([40], ROW_TOKENS)
    changed_L1 = tokens_L1.copy()
    changed_L1[12:] = 20
    examples = [
        OBJECTIVES["causal"](single_row(t, documents_L1), jax.random.key(0), SPECIAL)
        for t in (tokens_L1, changed_L1)
    ]

    @jax.jit
    def logits_of(e):
        return bind(model_config, params).logits(e.inputs_L[None], e.key_start_L[None], e.key_end_L[None])[0]

    logits = [logits_of(example) for example in examples]
    np.testing.assert_array_equal(logits[0][:12], logits[1][:12])
    assert np.abs(logits[0][12:] - logits[1][12:]).max() > 1e-3
