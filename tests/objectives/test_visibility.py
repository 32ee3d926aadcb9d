"""What each position can see, proved by gradients through the model rather than read off the key ranges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualsm.model.transformer import bind
from dualsm.objectives.example import SpecialIds, single_row
from dualsm.objectives.mixture import OBJECTIVES

from .conftest import packed

ROW_TOKENS = 20
LAYOUTS = {
    "one document": [40],
    "several": [5, 1, 9, 30],
    "starts and ends at the borders": [7, 13, 1],
    "with filling": [6, 8],
}


def influence(config, params, example) -> np.ndarray:
    """influence[i, j]: whether the features at position i change with the input at position j."""
    inputs, start, end = (a[None] for a in (example.inputs_L, example.key_start_L, example.key_end_L))

    def features(embeddings_LxD):
        model = bind(config, params)
        model.embedding = lambda _: embeddings_LxD
        return model.features(inputs, start, end)[0] @ jnp.linspace(0.5, 1.5, config.width)

    gradients_LxLxD = jax.jacrev(features)(bind(config, params).embedding(example.inputs_L))
    return np.abs(gradients_LxLxD).max(-1) > 0


def cases():
    for name in OBJECTIVES:
        for layout in LAYOUTS:
            yield pytest.param(name, layout, id=f"{name}-{layout}")


@pytest.mark.parametrize(("name", "layout"), cases())
def test_positions_see_exactly_what_the_objective_says(name, layout, model_config, params):
    tokens_L1, documents_L1 = packed(LAYOUTS[layout], ROW_TOKENS)
    row = single_row(tokens_L1, documents_L1)
    for seed in range(3):
        example = OBJECTIVES[name](row, jax.random.key(seed), SpecialIds())
        seen_LxL = influence(model_config, params, example)
        documents_L = documents_L1[:-1]
        for document in set(documents_L.tolist()):
            inside = np.flatnonzero(documents_L == document)
            others = np.flatnonzero(documents_L != document)
            assert not seen_LxL[np.ix_(inside, others)].any(), "another document is seen"
            view = seen_LxL[np.ix_(inside, inside)]
            if document >= 0:
                check_view(name, view, np.asarray(example.weights_L)[inside])


def check_view(name: str, seen: np.ndarray, weights: np.ndarray) -> None:
    """Checks who sees whom within one document of n tokens, whose losses have the given weights."""
    n = len(seen)
    causal = np.tri(n, dtype=bool)
    if name == "causal":
        assert (seen == causal).all()
    elif name == "masked_diffusion":
        assert seen.all()
    elif name == "prefix":
        prefix = int(seen[0].sum())  # the first position sees just the prefix
        assert 1 <= prefix <= n
        assert (seen == (causal | (np.arange(n) < prefix))).all()
        scored = np.flatnonzero(weights)
        if len(scored):
            # The last position of the prefix predicts the first token after it.
            assert scored[0] == prefix - 1
    else:
        raise AssertionError(f"say here what a {name} row sees")


def test_causal_outputs_do_not_depend_on_the_future(model_config, params):
    """The same by changing tokens instead of by gradients."""
    tokens_L1, documents_L1 = packed([40], ROW_TOKENS)
    changed_L1 = tokens_L1.copy()
    changed_L1[12:] = 20
    examples = [
        OBJECTIVES["causal"](single_row(t, documents_L1), jax.random.key(0), SpecialIds())
        for t in (tokens_L1, changed_L1)
    ]
    logits = [
        bind(model_config, params).logits(e.inputs_L[None], e.key_start_L[None], e.key_end_L[None])[0]
        for e in examples
    ]
    np.testing.assert_array_equal(logits[0][:12], logits[1][:12])
    assert np.abs(logits[0][12:] - logits[1][12:]).max() > 1e-3
