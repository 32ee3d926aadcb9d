"""The model card of an export: scores and config."""

import json

from dualsm.config import save_config
from dualsm.data.tokenizer_file import load_tokenizer
from dualsm.exchange.model_card import model_card
from dualsm.rundir.trained_run import TrainedRun
from tests.micro_sources import two_sources


def test_scores_have_their_number_of_questions(micro, corpus_path, tmp_path):
    tokenizer = load_tokenizer(str(corpus_path / "tokenizer.model"))
    trained = micro.copy_and_resolve_references()
    trained.model.attention = "flash"  # an opened run resets this key
    (tmp_path / "config.json").write_text(save_config(trained))
    (tmp_path / "eval").mkdir()
    modes = {
        "causal": {"score": 0.75, "stderr": 0.031, "n": 2000},
        "masked": {"score": 1.0, "stderr": None, "n": 1},  # as from --limit=1
    }
    (tmp_path / "eval" / "step_12.json").write_text(json.dumps({"tasks": {"blimp": modes}}))
    record = {"step": 12, "lr": 0.1, "valid/causal/loss": 3.0, "valid/causal/bits_per_byte": 1.25}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    card = model_card(TrainedRun(tmp_path, micro, tokenizer, 12, {}, None), plain=False)
    assert "| blimp | causal | 75.0 ± 3.1 % (n = 2,000) |" in card
    assert "| blimp | masked | 100.0 % (n = 1) |" in card
    assert "| held-out text | causal | 1.250 bits per byte |" in card
    assert '"attention": "flash"' in card


def test_each_source_is_listed(corpus_path, tmp_path):
    config = two_sources("corpora/small", corpus_path)
    config.sources.small.identity = "0123456789abcdef"
    (tmp_path / "config.json").write_text(save_config(config))
    tokenizer = load_tokenizer(str(corpus_path / "tokenizer.model"))
    record = {"step": 12, "valid/causal/bits_per_byte": 1.25, "valid/small/causal/bits_per_byte": 1.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    card = model_card(TrainedRun(tmp_path, config, tokenizer, 12, {}, None), plain=False)
    assert "| source small | 768 tokens of the run, 192 unique tokens x 4 repetitions |" in card
    assert "| source large | 2,304 tokens of the run, 2,304 unique tokens x 1 repetitions |" in card
    assert "| corpus of small | `small`, identity 0123456789ab |" in card
    assert "| small | masked_diffusion | 0.5 |" in card and "| large | causal | 0.75 |" in card
    assert "| held-out text | causal | 1.250 bits per byte |" in card


def test_shares_that_change_are_those_of_the_finished_steps(micro, corpus_path, tmp_path):
    micro.mixture.update({"causal": 1.0, "prefix": 0.0, "masked_diffusion": 0.0})
    micro.mixture_schedule.name, micro.mixture_schedule.path = "steps", "0.25 masked_diffusion=1"
    micro.repetitions = 5  # of 12 steps x 8 sequences x 32 tokens
    (tmp_path / "config.json").write_text(save_config(micro))
    tokenizer = load_tokenizer(str(corpus_path / "tokenizer.model"))
    card = model_card(TrainedRun(tmp_path, micro, tokenizer, 12, {}, None), plain=False)
    assert "| causal | 0.25 |" in card and "| masked_diffusion | 0.75 |" in card
    assert f"| unique tokens | {-(-12 * micro.batch_size * micro.seq_len // 5):,} |" in card
    card = model_card(TrainedRun(tmp_path, micro, tokenizer, 6, {}, None), plain=False)
    assert "| causal | 0.5 |" in card and "| masked_diffusion | 0.5 |" in card


def test_targets_of_the_trained_objectives(micro, corpus_path, tmp_path):
    tokenizer = load_tokenizer(str(corpus_path / "tokenizer.model"))

    def card(**mixture):
        micro.mixture.update(dict.fromkeys(micro.mixture, 0.0) | mixture)
        (tmp_path / "config.json").write_text(save_config(micro))
        return model_card(TrainedRun(tmp_path, micro, tokenizer, 12, {}, None), plain=False)

    text = card(causal=0.5, masked_diffusion=0.5)
    assert "\nPosition i predicts token i + 1, so the prediction for a masked token is" in text
    assert "changes the target" not in text
    text = card(causal=0.5, diverse_causal=0.25, next_all=0.25)
    assert "\nWithout mode tokens, position i predicts token i + 1" in text
    assert (
        "A mode token in place of a document's first token changes the target: with `diverse_causal`, "
        "position i predicts x_{i+d}, d drawn for each row; with `next_all`, position i predicts one of "
        "x_{i+1} .. x_n, drawn at random."
    ) in text
