"""The adapter for lm-evaluation-harness: logic without that package, and equal scores with it."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from dualsm.config import freeze
from dualsm.evaluation import harness
from dualsm.evaluation.harness_arguments import command_line_as_json, read_masks, read_model_args
from dualsm.evaluation.harness_requests import GenerationRequest, read_request
from dualsm.evaluation.modes import MODES, ScoringParams
from dualsm.evaluation.scoring import Item, Scorer, encode_pair
from dualsm.evaluation.task_metrics import answer_values, compute_metrics
from dualsm.evaluation.tasks import load_task
from dualsm.generation import autoregressive, diffusion
from dualsm.generation.sampling_params import SamplingParams
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import open_run
from tests.conftest import ROOT, command_env

pytestmark = pytest.mark.slow

PAIRS = [("def main", "(self):"), ("", "import os"), ("import os\nimport ", "sys\n"), ("", "import os")]
GREEDY = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}


@pytest.fixture(scope="module")
def workdir(corpus_path, tmp_path_factory):
    from dualsm.training.loop import train
    from tests.micro import micro_config

    config = micro_config(corpus_path)
    config.mesh.data = -1
    path = tmp_path_factory.mktemp("harness") / "run"
    assert train(config, path)
    return path


@pytest.fixture(scope="module")
def run(workdir):
    return open_run(workdir)


@pytest.fixture(scope="module")
def model(workdir):
    made = {}

    def model(mode):
        if mode not in made:
            made[mode] = harness.HarnessModel(str(workdir), mode=mode, masks="1+4", samples=8)
        return made[mode]

    return model


def requests(*args):
    """Returns requests with the attributes of the harness's requests that the adapter reads."""
    return [SimpleNamespace(args=a, task_name="task", doc_id=i) for i, a in enumerate(args)]


def test_speculative_model_scores_causally(model, workdir):
    same = [
        model(mode).loglikelihood(requests(*PAIRS), disable_tqdm=True) for mode in ("speculative", "causal")
    ]
    assert same[0] == same[1]
    with pytest.raises(UserError, match="draft=99"):
        harness.HarnessModel(str(workdir), mode="speculative", draft=99)


def test_a_cache_of_blocks_as_long_as_the_text_changes_nothing(model, workdir):
    """Blocks are then not causal; shorter ones are tested in tests/generation."""
    cached = harness.HarnessModel(str(workdir), mode="masked", masks=1, cache="True", block=32)
    asked = requests(*((prompt, GREEDY | {"until": []}) for prompt in ("def main", "import os\n")))
    assert cached.generate_until(asked) == model("masked").generate_until(asked)


def own_scorer(run):
    return Scorer(freeze(run.config.model), run.params, run.tokenizer, run.mesh)


def scoring(mode):
    return ScoringParams(mode, masks=(1, 4), samples=8, max_length=32)


@pytest.mark.parametrize("mode", MODES)
def test_loglikelihood_equals_our_score_for_any_batch(model, run, mode):
    answers = model(mode).loglikelihood(requests(*PAIRS[::-1]), disable_tqdm=True)[::-1]
    ours = own_scorer(run)([Item(*pair) for pair in PAIRS], scoring(mode), quiet=True)
    np.testing.assert_allclose([score for score, _ in answers], ours.log_likelihood_N, atol=1e-3)
    assert [greedy for _, greedy in answers] == ours.greedy_N.tolist()
    assert answers[1] == answers[3]


@pytest.mark.parametrize("mode", ["causal", "masked"])
def test_long_continuations_are_scored_in_parts(model, run, mode, capsys):
    texts = [Item("def main", "(self):\n    return self\n" * n) for n in range(1, 31)]
    pairs = [encode_pair(run.tokenizer, text) for text in texts]
    number = next(n for n, (_, rest) in enumerate(pairs) if len(rest) > 31)
    start, rest = pairs[number]
    assert len(rest) < 62  # two parts
    answers = model(mode).loglikelihood(requests(texts[number], PAIRS[0]), disable_tqdm=True)
    pairs = [([], rest[:31]), (start + rest[:31], rest[31:])]
    ours = own_scorer(run).score_tokens(pairs, scoring(mode), quiet=True)
    assert answers[0][0] == pytest.approx(ours.log_likelihood_N.sum(), abs=1e-3)
    assert answers[0][1] == ours.greedy_N.all()
    assert "1 continuations are longer than the sequence length (32 tokens)" in capsys.readouterr().err


def test_ties_are_reported_because_the_harness_takes_the_first(model, capsys):
    asked = requests(("", "same"), ("", "same"), ("", "other"), ("", "import os"), ("", "os import"))
    for request, question in zip(asked, (0, 0, 0, 1, 1), strict=True):
        request.doc_id = question
    scores = [score for score, _ in model("causal").loglikelihood(asked, disable_tqdm=True)]
    assert scores[0] == scores[1] > scores[2]
    assert "1 questions have two best answers" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["causal", "masked"])
def test_rolling_score_counts_every_token_once(model, run, mode):
    text = "import os\nimport sys\n\n\ndef main(self):\n    return os.path.join(self.a, self.b)\n" * 2
    tokens = run.tokenizer.encode([text])[0]
    assert 62 < len(tokens) < 93  # two full rows and a partial row
    (long, short) = model(mode).loglikelihood_rolling(requests((text,), ("import os",)), disable_tqdm=True)
    pairs = [([], tokens[:31]), ([], tokens[31:62]), (tokens[len(tokens) - 31 : 62], tokens[62:])]
    ours = own_scorer(run).score_tokens(pairs, scoring(mode), quiet=True).log_likelihood_N
    assert long == pytest.approx(ours.sum(), abs=1e-3)
    assert short == pytest.approx(model(mode).loglikelihood(requests(("", "import os")))[0][0], abs=1e-3)


def continuation(run, mode, prompt, tokens):
    """Returns the continuation of a single text, without the adapter."""
    special = run.tokenizer.special
    start = [special.bos, *run.tokenizer.encode([prompt])[0][-(31 - tokens) :]]
    config, greedy = freeze(run.config.model), SamplingParams(temperature=0)
    mode = "causal" if mode == "speculative" else mode
    if mode in autoregressive.MODES:
        states = autoregressive.generate(config, run.params, [start], tokens, greedy, special, mode)
    else:
        text, unmasking = start + [special.mask] * tokens, diffusion.UnmaskingParams(block=32)
        states = diffusion.infill(config, run.params, [text], greedy, unmasking, special)
    return run.tokenizer.decode(list(states)[-1][0][len(start) :])


@pytest.mark.parametrize("mode", ["causal", "prefix", "masked", "speculative"])
def test_texts_equal_those_of_generate_up_to_the_stop_string(model, run, mode):
    prompts = ["def main", "import os\nimport ", "import sys\n" * 20]
    whole = model(mode).generate_until(requests(*((p, GREEDY | {"until": []}) for p in prompts)))
    assert whole == [continuation(run, mode, prompt, 6) for prompt in prompts]
    assert all(whole)
    ends = [text[len(text) // 2] for text in whole]
    cut = model(mode).generate_until(
        requests(*((p, GREEDY | {"until": [end, "never"]}) for p, end in zip(prompts, ends, strict=True)))
    )
    assert cut == [text[: text.index(end)] for text, end in zip(whole, ends, strict=True)]


def test_requests_with_different_options_keep_their_order(model):
    arguments = [("import os", GREEDY | {"until": [], "max_gen_toks": n}) for n in (5, 1, 3, 5)]
    texts = model("causal").generate_until(requests(*arguments), disable_tqdm=True)
    assert texts[0] == texts[3]
    assert texts[0].startswith(texts[2])
    assert texts[2].startswith(texts[1])


@pytest.mark.parametrize("mode", ["causal", "masked", "speculative"])
def test_sampled_texts_differ_and_do_not_depend_on_other_requests(model, mode):
    """Requests more samples of one prompt than a batch contains, like tasks with `repeats`."""
    sampled = {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8}
    same, others = [("import os", sampled)] * 48, [("def main", sampled), ("a", sampled | {"top_k": 9})]
    texts = model(mode).generate_until(requests(*same), disable_tqdm=True)
    assert len(set(texts)) > 40  # a few may be equal by chance
    mixed = model(mode).generate_until(requests(*others, *same[:3], *others), disable_tqdm=True)
    assert mixed[2:5] == texts[:3]
    assert model(mode).generate_until(requests(*others), disable_tqdm=True) == mixed[:2]


def test_generation_kwargs_are_parsed():
    assert read_request({}, 64) == GenerationRequest((), 32, SamplingParams(0.0))
    assert read_request({"until": "\n", "max_new_tokens": 8}, 64) == GenerationRequest(
        ("\n",), 8, SamplingParams(0.0)
    )
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "until": ["a", ""]}
    assert read_request(sampled, 1024) == GenerationRequest(("a",), 256, SamplingParams(0.7, 5, 0.9))
    assert read_request({"temperature": 0.7}, 64).sampling == SamplingParams(0.7)
    assert read_request({"temperature": 0.7, "do_sample": False}, 64).sampling == SamplingParams(0.0)
    assert read_request({"temperature": None, "top_k": None, "until": None}, 64).sampling == SamplingParams(
        0.0
    )
    for options in (
        {"num_beams": 4},
        {"temperature": "warm"},
        {"temperature": float("nan")},
        {"max_tokens": 0},
    ):
        with pytest.raises(UserError, match="num_beams|not a number|temperature|must be at least 1"):
            read_request(options, 64)


def test_masks_are_parsed_from_the_command_line():
    assert read_masks(4) == read_masks("4") == (4,)
    for masks in ("1+4", "[1,4]", [1, 4]):
        assert read_masks(masks) == (1, 4)
    with pytest.raises(UserError, match="telepathy"):
        read_masks("telepathy")


def test_argument_values_can_contain_commas_and_equals_signs(tmp_path):
    cell = tmp_path / "alpha=0.5,seed=1"
    cell.mkdir()
    expected = {"workdir": str(cell), "mode": "masked", "masks": "[1,4]", "seed": "2"}
    text = f"workdir={cell},mode=masked,masks=[1,4],seed=2"
    assert read_model_args(text) == expected
    assert read_model_args(f"mode=masked,masks=[1,4],seed=2,workdir={cell}") == expected
    assert read_model_args("workdir=nowhere,mode=prefix") == {"workdir": "nowhere", "mode": "prefix"}
    assert read_model_args("") == {}
    for given in (["--model_args", text], [f"--model_args={text}"], ["-a", *text.split(",mode=masked")]):
        flag, found, *rest = command_line_as_json([*given, "--tasks", "a=b", "--limit=3"])
        assert rest == ["--tasks", "a=b", "--limit=3"]
        assert json.loads(found).items() <= expected.items()
        assert json.loads(found)["workdir"] == str(cell)
    others = ["--model", "hf", "--model_args", "pretrained=a,dtype=b"]
    assert command_line_as_json(others) == others


def test_invalid_arguments_are_rejected(workdir):
    for arguments, message in (
        ({}, "no workdir"),
        ({"workdir": str(workdir), "speed": 3}, "unknown speed"),
        ({"workdir": str(workdir), "mode": "telepathy"}, "telepathy"),
        ({"workdir": "nowhere"}, "nowhere"),
        ({"workdir": str(workdir), "samples": "many"}, "samples='many'"),
        ({"workdir": str(workdir), "seed": -1}, "seed=-1"),
        ({"workdir": str(workdir), "cache": "maybe"}, "cache='maybe'"),
        ({"workdir": str(workdir), "cache": True}, "no effect in mode causal"),
        ({"workdir": str(workdir), "mode": "masked", "cache": True, "block": 0}, "with block=0"),
    ):
        with pytest.raises(UserError, match=message):
            harness.HarnessModel(**arguments)


def test_missing_package_error_says_what_to_install():
    code = "import sys; sys.modules['lm_eval'] = None; from dualsm.evaluation import harness; harness.main()"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=command_env()
    )
    assert process.returncode == 2
    assert process.stderr.strip().splitlines() == [
        "error: lm_eval is not installed: pip install 'dualsm[eval]'"
    ]


BLIMP = [
    {"sentence_good": "Who runs?", "sentence_bad": "Who run?"},
    {"sentence_good": "import os", "sentence_bad": "os import"},
]
ARC = [
    {"question": q, "choices": {"text": ["import os", "a cell"], "label": ["A", "B"]}, "answerKey": a}
    for q, a in (("What lives?", "B"), ("What is code?", "A"), ("What is not?", "B"))
]
TEXTS = {
    "blimp": ("", "{{[sentence_good, sentence_bad]}}", "0", ""),
    "arc_easy": (
        "Question: {{question}}\nAnswer:",
        "{{choices.text}}",
        "{{choices.label.index(answerKey)}}",
        " ",
    ),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Returns a folder with task data for `dualsm.evaluate`, and task files of the harness for it."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in (("blimp", BLIMP), ("arc_easy", ARC)):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        text, choice, target, delimiter = TEXTS[name]
        task = {
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"validation": str(data)}},
            "output_type": "multiple_choice",
            "validation_split": "validation",
            "doc_to_text": text,
            "doc_to_choice": choice,
            "doc_to_target": target,
            "target_delimiter": delimiter,
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is valid YAML
    return folder


@pytest.mark.extras
@pytest.mark.parametrize("mode", MODES)
def test_harness_reports_our_scores_and_accuracies(workdir, run, tasks, mode):
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'dualsm[eval]'")
    from lm_eval.tasks import TaskManager

    harness.register()
    names = ["blimp", "arc_easy"]
    theirs = lm_eval.simple_evaluate(
        model=harness.NAME,
        model_args={"workdir": str(workdir), "mode": mode, "masks": [1, 4], "samples": 8},
        tasks=[f"local_{name}" for name in names],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    assert theirs["config"]["scoring"]["mode"] == mode
    for name in names:
        questions = load_task(name, tasks)
        scores = [own_scorer(run)(q.items, scoring(mode), quiet=True).log_likelihood_N for q in questions]
        samples = sorted(theirs["samples"][f"local_{name}"], key=lambda sample: sample["doc_id"])
        for sample, score in zip(samples, scores, strict=True):
            np.testing.assert_allclose([resp[0] for resp in sample["filtered_resps"]], score, atol=1e-3)
        for metric in ("acc", "acc_norm"):
            ours = compute_metrics(questions, answer_values(questions, scores, None))[metric].accuracy
            assert theirs["results"][f"local_{name}"][f"{metric},none"] == pytest.approx(ours)


@pytest.mark.extras
def test_command_runs_a_local_task(workdir, tasks, tmp_path):
    """The run directory has commas and equals signs in its name, like the cells of a sweep."""
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'dualsm[eval]'")
    cell = tmp_path / "alpha=0.5,seed=1"
    cell.symlink_to(workdir)
    process = subprocess.run(
        [sys.executable, "-m", "dualsm.evaluation.harness", "--model", "dualsm", "--model_args",
         f"workdir={cell},mode=prefix", "--include_path", str(tasks), "--tasks", "local_blimp",
         "--output_path", str(tmp_path / "scores")],
        capture_output=True, text=True, cwd=ROOT, env=command_env() | {"HF_HUB_OFFLINE": "1"}, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    (written,) = (tmp_path / "scores").rglob("*.json")
    assert json.loads(written.read_text())["results"]["local_blimp"]["acc,none"] in (0.0, 0.5, 1.0)
