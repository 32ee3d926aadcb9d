"""Export of runs with unshifted masked diffusion."""

import jax
import pytest

from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.exchange import export_huggingface, export_reference
from dualsm.exchange.imported_run import write_run
from dualsm.model.transformer import init_params
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import TrainedRun, open_run


@pytest.fixture
def make_run(micro, corpus_path, tmp_path):
    """Returns a function that makes a run with random weights."""

    def make(head: str, shifted: bool = False) -> TrainedRun:
        tokenizer = load_tokenizer(str(corpus_path / "tokenizer.model"))
        micro.mesh.data, micro.model.vocab_size, micro.model.head = -1, tokenizer.vocab_size, head
        micro.objectives.masked_diffusion.shifted = shifted
        params = init_params(micro.model, jax.random.key(0))
        write_run(micro, params, tokenizer, tmp_path / "run", {"format": "test", "weights": "w"})
        return open_run(tmp_path / "run")

    return make


def test_an_export_with_masked_modes_is_rejected(make_run, tmp_path):
    run, output = make_run("projected"), tmp_path / "out"
    for export in (export_huggingface.export, export_reference.export):
        with pytest.raises(UserError, match=r"shifted=False, .*; use dualsm, in the modes causal and prefix"):
            export(run, output)
    assert not output.exists()


def test_an_export_for_a_stock_class_is_only_for_causal_use(make_run, tmp_path):
    run = make_run("plain")
    with pytest.raises(UserError, match=r"shifted=False, .*; leave out --own_code"):
        export_huggingface.export(run, tmp_path / "out", own_code=True)
    export_huggingface.export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Do not use the exported model to predict masked tokens." in card
    assert "at the position before it" not in card and "as the mask token" not in card
    assert "for the mode `prefix` use dualsm" in card


def test_an_option_of_an_objective_that_is_not_trained_does_not_matter(make_run, micro, tmp_path):
    micro.mixture.causal, micro.mixture.masked_diffusion = 0.75, 0.0
    run = make_run("projected")
    export_huggingface.export(run, tmp_path / "out")
    export_reference.export(run, tmp_path / "reference")
    assert '`mode="masked"`' in (tmp_path / "out" / "README.md").read_text()
