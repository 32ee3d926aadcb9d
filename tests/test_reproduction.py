"""The reproduction's page follows from its tables, and its choices from the protocol's rules."""

import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dualsm.analysis.advice import SHIPPED
from dualsm.config import difference
from dualsm.model.transformer import init_params
from dualsm.sweeps.grid import parse_value

FOLDER = Path(__file__).parents[1] / "docs" / "reproduction"
README = FOLDER.parents[1] / "README.md"
# Numbers with a decimal point that the template may have: settings, the expectations of the protocol, a link.
SETTINGS = {"0.01", "0.02", "0.1", "0.995", "2512.14549"}
EXPECTED = {"0.2", "0.15", "0.05", "0.03"}
FROM_SETTINGS = {"finer_decay", "largest", "parameters", "budget", "unique_128", "unique_32"}
FROM_THE_PAPER = {"rule_128", "rule_32_weighted", "rule_128_weighted"}
pd = pytest.importorskip("pandas")


@pytest.fixture(scope="module")
def modules():
    sys.path.insert(0, str(FOLDER))
    import page
    import page_numbers
    import page_plots
    import page_tables
    import selection
    import study

    sys.path.remove(str(FOLDER))
    return SimpleNamespace(
        page=page,
        numbers=page_numbers,
        plots=page_plots,
        tables=page_tables,
        selection=selection,
        study=study,
    )


@pytest.fixture(scope="module")
def tables(modules):
    return modules.numbers.read_tables()


@pytest.fixture(scope="module")
def values(modules, tables):
    return modules.numbers.page_values(tables)


def words(text):
    return " ".join(text.split())


def test_the_page_is_what_the_tables_give(modules, tables):
    page = modules.page
    assert page.render(tables) == page.PAGE.read_text()
    assert page.averaged_page(tables.runs, tables.checkpoints) == page.AVERAGED.read_text()
    assert page.methods_page(tables) == page.EVERY_METHOD.read_text()


def test_the_plots_are_what_the_tables_give(modules, tables, tmp_path):
    """A tolerance allows for other versions of matplotlib."""
    from matplotlib.testing.compare import compare_images

    modules.plots.plot_curves(tables.curves, tables.runs, tmp_path / "curves.png")
    modules.plots.plot_lengths(tables.runs, tmp_path / "lengths.png")
    for name in ("curves.png", "lengths.png"):
        assert compare_images(str(FOLDER / name), str(tmp_path / name), tol=5) is None


def test_the_table_of_two_sources_is_that_of_its_csv(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import two_sources_scores

    lines = (FOLDER / "two_sources.md").read_text().splitlines()
    rows = [line.split(" | ", 1)[1] for line in lines if line.startswith("| ") and "±" in line]
    means = two_sources_scores.means(pd.read_csv(two_sources_scores.TABLE))
    assert rows == [" | ".join(row) + " |" for row in means.itertuples(index=False)]


def test_the_page_is_short(modules):
    assert len(modules.page.PAGE.read_text().split()) <= 1800


def test_results_are_not_written_into_the_template(modules):
    text = re.sub(r"\{\w+\}", "", modules.page.TEMPLATE.read_text())
    assert set(re.findall(r"\d+\.\d+", text)) == SETTINGS | EXPECTED


def changed(tables, rng):
    """Returns tables of a smaller study with other losses, in which every tuned setting was confirmed."""

    def scaled(table, columns):
        factors = 1 + 0.3 * rng.random((len(table), len(columns)))
        return table.assign(**dict(zip(columns, (table[columns] * factors).T.to_numpy(), strict=True)))

    def losses(table):
        return scaled(table, [c for c in table if re.search("(causal|masked_diffusion)(/loss)?$", c)])

    tuned = tables.runs[(tables.runs.corpus == "A") & (tables.runs.stage != "explore")]
    tuned = tuned[~tuned.weight_decay.isin([1, 2]) & ((tuned.recipe == "mir") | (tuned.length > 1 / 16))]
    tuned = tuned[(tuned.R == 128) | (tuned.weight_decay != 0.3)]
    tuned = losses(tuned[~tuned.alpha.isin([1 / 4, 15 / 16])])
    others = tuned[tuned.recipe != "plain"].assign(stage="confirm others")
    plain = tuned[tuned.recipe == "plain"].assign(stage="confirm")
    confirmed = [
        plain.assign(corpus=corpus, seed=seed, causal_weight=weight)
        for corpus in "BCD" for seed in (1, 2, 3) for weight in (1, 2)
    ]  # fmt: skip
    confirmed += [others.assign(corpus=corpus, seed=seed) for corpus in "BC" for seed in (1, 2)]
    confirmed = losses(pd.concat(confirmed))
    sizes = confirmed[(confirmed.seed == 1) & (confirmed.causal_weight == 1)]
    sizes = [losses(sizes.assign(size=size)) for size in ("61k", "1.0M")]
    repeated = losses(confirmed[(confirmed.recipe == "plain") & (confirmed.causal_weight == 1)])
    explored = [
        losses(tuned[(tuned.recipe == "plain") & (tuned.R == 128) & (tuned.length == 1)]).assign(
            corpus=corpus, seed=1
        )
        for corpus in "ABC"
    ]
    explored = (
        pd.concat(explored).drop_duplicates(["alpha", "corpus"]).assign(stage="explore", weight_decay=1.4)
    )
    plain = tuned[(tuned.recipe == "plain") & (tuned.R == 128)].assign(stage="explore", recipe="rate")
    rates = [plain[plain.alpha < 1], *(plain[plain.alpha == 1].assign(corpus=c, seed=1) for c in "BC")]
    repeated = repeated[(repeated.alpha < 1) | (repeated.length < 1)]
    runs = pd.concat([tuned, confirmed, *sizes, explored, *map(losses, rates)], ignore_index=True)
    runs = runs.assign(skipped=rng.integers(0, 2, len(runs)))
    runs.loc[0, "test_causal"] = np.nan
    earlier = losses(tables.earlier[(tables.earlier.repetitions != 16) | (tables.earlier.steps == 230)])
    earlier = earlier[(earlier.seed == 0) | (earlier.steps != 1840)]
    unigram = scaled(tables.unigram, ["test"])
    tasks = scaled(tables.tasks, ["bits_per_byte"])
    documents = tables.documents
    documents = documents.assign(causal_nats=documents.causal_nats * (1 + rng.random(len(documents))))
    documents = documents[documents.unit != rng.choice(documents.unit)]
    changed = {
        "runs": runs,
        "documents": documents,
        "earlier": earlier,
        "unigram": unigram,
        "repeated": repeated,
        "tasks": tasks,
    }
    return tables._replace(baselines=losses(tables.baselines), **changed)


def test_other_tables_give_another_page(modules, tables, values):
    """Each number depends on the tables, except for settings of the study and the paper's rules."""
    names = set(re.findall(r"\{(\w+)\}", modules.page.TEMPLATE.read_text()))
    rng, differ = np.random.default_rng(0), set()
    for _ in range(6):
        found = modules.numbers.page_values(changed(tables, rng))
        differ |= {name for name in names if found[name] != values[name]}
    assert names - differ == FROM_SETTINGS | FROM_THE_PAPER | {"price_share"}


@pytest.mark.parametrize("loss", [np.nan, np.inf, 9.0])
def test_runs_that_diverged_are_counted(modules, tables, loss):
    runs, here = tables.runs.copy(), (tables.runs.weight_decay == 0.1) | (tables.runs["size"] != "230k")
    runs.loc[here, "test_causal"] = loss
    assert modules.numbers.count_runs(runs, tables.repeated)["num_diverged"] == str(here.sum())
    assert modules.numbers.count_runs(tables.runs, tables.repeated)["num_diverged"] == "0"


def test_the_readme_has_the_numbers_of_the_page(modules, tables, values):
    readme = words(README.read_text())
    assert words(modules.tables.readme_table(tables.runs, tables.repeated)) in readme
    alpha = modules.selection.Chosen(tables.runs).mixture(128, "full")["alpha"]
    ratio = modules.numbers.word(alpha / (1 - alpha))
    for text in (
        f"{ratio} causal sequences for one of masked diffusion",
        f"Lines are means of {values['replicates_128']} runs on three corpora (dashed: two runs)",
        f"the best of {values['num_decays']} weight decays unless stated",
        f"The causal runs with weight decay {values['finer_decay']} were added after the study",
        f"With learning rate 0.02, stopping early reaches {values['rate_stop']}; the remaining difference",
        f"are {values['masked_causal_dropout']} and {values['masked_mir']} "
        f"(mixture {values['masked_mixture']})",
        f"With {values['largest']} parameters (R = 128, not tuned) the mixture's causal loss differs by "
        f"{values['largest_compute']} from the full causal run's and by {values['largest_stop']} from",
        f"With {values['unique_32']} unique tokens (R = 32), causal losses are indistinguishable",
        f"Models of {values['parameters']} parameters train on {values['unique_128']} unique tokens",
        f"({values['num_gpu']} runs of {values['parameters']} parameters)",
    ):
        assert text in readme


def test_claims_in_words_hold(modules, tables):
    """Sentences of the page without a number."""
    runs, chosen = tables.runs, modules.selection.Chosen(tables.runs)
    replicates = modules.selection.Replicates(runs)
    for alpha in chosen.alphas(32):  # R = 32: nothing gained from stopping early
        assert chosen.best("plain", 32, alpha, "stop")["length"] == 1
    causal, mixture = chosen.best("plain", 128, 1.0, "full"), chosen.mixture(128, "full")
    alike = (chosen.mixture(32, "full"), chosen.best("plain", 32, 1.0, "full"))
    mean, error = replicates.difference(*alike, "test_causal")
    assert abs(mean) < modules.numbers.T_95 * error  # cannot be distinguished
    for R in (32, 128):  # the masked loss is lowest at the smallest share
        cells = [chosen.best("plain", R, alpha, "full") for alpha in chosen.alphas(R)]
        losses = [replicates.values(cell, "test_masked_diffusion") for cell in cells]
        masked = [modules.selection.over_corpora(found)[0] for found in losses]
        assert masked == sorted(masked)
    tuned = runs[runs.stage == "tune"]
    smallest = chosen.best("plain", 128, chosen.alphas(128)[0], "full")
    assert smallest["weight_decay"] == tuned[tuned.R == 128].weight_decay.min()
    short, full = tuned[tuned.length <= 1 / 8], tuned[tuned.length == 1]
    overfit = full[(full.R == 128) & (full.alpha >= 3 / 4) & (full.weight_decay <= 0.5)]
    assert (short.ema_dev_causal > short.dev_causal).mean() > 0.9  # EMA harms short runs
    assert (overfit.ema_dev_causal < overfit.dev_causal).all()
    for _, found in tuned.groupby(["R", "alpha"]):  # the highest weight decay underfits
        best = found.groupby("weight_decay").dev_causal.min()
        assert best.idxmin() < best.index.max()
    cells = modules.tables.method_cells(chosen)
    methods = modules.tables.method_replicates(runs, tables.repeated)
    largest = abs(modules.numbers.repeated_changes(runs, tables.repeated)).max()
    for method in ("causal dropout", "mir"):  # not worse, and not clearly better
        assert -largest < methods.difference(cells[method], cells["mixture"], "test_causal")[0] < 0
    averaged = {
        method: modules.selection.over_corpora(methods.values(cell, "ema_test_causal"))[0]
        for method, cell in cells.items()
    }
    assert min(averaged, key=averaged.get) == "mir"
    tuned = {
        (run["alpha"], run["weight_decay"]): run["dev_causal"]
        for run in runs.query("corpus == 'A' and R == 128 and length == 1 and recipe == 'plain'").to_dict(
            "records"
        )
    }
    assert min(tuned, key=tuned.get) == (
        mixture["alpha"],
        mixture["weight_decay"],
    )  # also of the finer decays
    assert tuned[1.0, modules.tables.FINER_DECAY] < min(tuned[1.0, decay] for decay in (1.0, 1.7, 2.0))
    last = {
        method: modules.selection.over_corpora(methods.values(cell, "test_causal"))[0]
        for method, cell in cells.items()
    }
    best = [last[method] for method in ("causal dropout", "mir", "mixture")]  # methods.md
    assert max(best) - min(best) < 0.02
    faster = chosen.best("plain", 128, 1.0, "stop") | {"recipe": "rate"}
    stop = modules.tables.cpu_replicates(runs, tables.repeated).common_difference(
        chosen.mixture(128, "stop"), faster, "test_causal"
    )
    assert abs(stop[0]) < modules.numbers.T_95 * stop[1]  # not significant
    earlier = tables.baselines[(tables.baselines.alpha == 1) & (tables.baselines.repetitions == 32)]
    earlier = earlier[(earlier["optimizer.weight_decay"] == 1) & (earlier.status == "done")]
    by_rate = earlier.groupby("optimizer.learning_rate")["valid/causal/loss"].mean()
    assert by_rate[0.02] < by_rate[0.01]  # better already in earlier runs
    fast = runs[(runs.recipe == "rate") & (runs.alpha < 1)]
    assert fast.dev_causal.min() > tuned[mixture["alpha"], mixture["weight_decay"]]
    assert len(fast) == 4 and fast.groupby("weight_decay").dev_causal.min().idxmin() == 1.0
    finer = causal | {"weight_decay": modules.tables.FINER_DECAY}
    on_cpu = modules.tables.cpu_replicates(runs, tables.repeated)
    fine, coarse = (
        on_cpu.common_difference(mixture, finer, "test_causal"),
        replicates.difference(mixture, causal, "test_causal"),
    )
    assert coarse[0] / 2 < fine[0] < 0  # most of the first contrast is due to the coarse grid


def test_claims_about_sizes_hold(modules, tables):
    """Sentences of the page without a number."""
    changes = modules.tables.size_changes(tables.runs, tables.repeated)
    assert list(changes) == ["61k", "230k", "1.0M"]
    assert all(len(found) == 2 for size in ("61k", "230k") for found in changes[size].values())
    compute, _, stop = changes["1.0M"].values()
    repeated = abs(modules.numbers.repeated_changes(tables.runs, tables.repeated)).max()
    assert len(compute) == len(stop) == 2 and min(stop) > -repeated  # not better
    tuned = changes.pop("230k")["equal compute"]
    for size in changes.values():
        assert max(tuned) < min(size["equal compute"]) and max(size["equal compute"]) < 0
    averaged = modules.tables.size_changes(tables.runs, tables.repeated, "ema_test_causal")["1.0M"]
    assert min(averaged["equal compute"]) < 0 < max(averaged["equal compute"])  # not clearly better
    largest = tables.runs[
        (tables.runs["size"] == "1.0M") & (tables.runs.alpha < 1) & (tables.runs.corpus == "B")
    ]
    lengths = largest.set_index("length").dev_causal
    assert set(lengths.index) == {0.25, 0.5, 1.0} and lengths.idxmin() == 1.0  # methods.md


def test_claims_about_options_of_the_optimizer_hold(modules, tables):
    """Sentences of methods.md without a number."""
    mixture = modules.selection.Chosen(tables.runs).mixture(128, "full")
    replicates = modules.tables.cpu_replicates(tables.runs, tables.repeated)
    changes = {
        name: replicates.common_difference(mixture | {"recipe": name}, mixture, "test_causal")[0]
        for name in ("exempt", "linear", "adamw")
    }
    assert min(changes["exempt"], changes["linear"]) > 0.2 and abs(changes["adamw"]) < 0.02
    assert str(modules.study.ADAMW_RATE) in modules.tables.OPTIONS["adamw"]
    assert str(modules.study.HIGH_RATE) in modules.tables.OPTIONS["rate"]


def test_the_moving_average_is_the_best_of_the_three_kinds_of_weights(tables):
    """A sentence of averaged_weights.md."""
    by_corpus = tables.checkpoints.pivot(index="corpus", columns="weights", values="test_causal")
    assert len(by_corpus) == 2 and (by_corpus.idxmin(axis=1) == "moving average").all()


def test_more_compute_does_not_help_mir(modules, tables):
    """A sentence of methods.md."""
    values = modules.numbers.method_values(tables)
    assert min(float(values[name].split()[0]) for name in ("mir_full_change", "mir_full_ema_change")) > 0.01


def test_dropout_lowers_the_causal_loss_of_causal_training_only(tables):
    """A sentence of methods.md."""
    runs = pd.concat([tables.runs, tables.repeated]).query("R == 128 and corpus != 'A' and size == '230k'")
    cell = ["recipe", "alpha", "weight_decay", "length"]
    by_corpus = runs[runs.causal_weight == 1].groupby([*cell, "corpus"]).test_causal.mean()
    best = by_corpus.groupby(cell).mean().groupby(cell[:2]).min()
    assert best["dropout", 1] < best["plain", 1]
    for alpha in (1 / 4, 1 / 2, 3 / 4):
        assert best["dropout", alpha] > best["plain", alpha]
    assert best["mir+dropout", 1] > best["mir", 1]


def test_claims_about_task_scores_hold(tables, monkeypatch):
    """Sentences of methods.md without a number."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import task_scores

    scores, methods = tables.tasks, ("causal", "causal finer", "causal dropout", "mir", "mixture dropout")
    assert set(scores.method) == {*methods, "mixture"} and set(scores.corpus) == {*"BCD"}
    assert (scores.groupby(["method", "corpus"]).task.nunique() == 9).all()
    questions, hellaswag = scores[scores.task != "blimp"], scores[scores.task == "hellaswag"]
    means = {method: task_scores.answer_change(hellaswag, method)[0] for method in methods}
    errors = {method: task_scores.answer_change(hellaswag, method)[1] for method in methods}
    assert max(means["causal dropout"], means["mir"]) < 0.01
    for method in ("causal", "causal finer"):
        assert means[method] > 0.05 and means[method] > 4.303 * errors[method]
    of_all = {method: task_scores.answer_change(questions, method)[0] for method in methods}
    assert of_all["mixture dropout"] == max(of_all.values())
    for method in methods:
        errors = [task_scores.answer_change(table, method)[1] for table in (hellaswag, questions)]
        assert errors[0] < errors[1] / 2
    accuracy = questions.groupby("method")[["score", "unigram_score"]].mean()
    assert (abs(accuracy.score - accuracy.unigram_score) < 0.005).all()
    blimp = scores[scores.task == "blimp"]
    by_method = blimp.groupby("method")[["score", "slor"]].mean()
    assert np.ptp(by_method.score) < 0.02 and (by_method.slor < 0.5).all()
    assert (by_method.score < blimp.unigram_score.min()).all()
    equal = blimp.groupby("method").equal_length
    assert (equal.mean() - 4.303 * equal.std() / 3**0.5 < 0.5).all()
    paradigms = tables.paradigms
    assert paradigms.groupby(["method", "corpus"]).n.sum().unique().tolist() == [12_000]
    means = paradigms.groupby(["paradigm", "method"]).score.mean().unstack()
    largest = means.sub(means.mixture, axis=0).abs().stack().nlargest(2)
    assert sorted(largest.index) == [
        ("ellipsis_n_bar_1", f"{name} dropout") for name in ("causal", "mixture")
    ]
    assert (means.loc["ellipsis_n_bar_1"] < 0.5).all()


def test_claims_about_domains_hold(modules, tables, monkeypatch):
    """Sentences of methods.md without a number; the documents are those of the methods' runs."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import document_losses

    documents, methods = tables.documents, modules.tables.METHODS.keys()
    assert set(documents.method) == set(methods)
    for _, part in documents.groupby("unit"):
        assert part.groupby(["method", "corpus"]).size().unique().size == 1
        for objective in ("causal", "masked_diffusion"):
            assert part.groupby(["corpus", "method"])[f"{objective}_weight"].sum().nunique() == 1
    domain = documents.unit.map(document_losses.domain_of)
    assert domain.nunique() == 3
    for method in methods - {"mixture"}:
        signs = {document_losses.change(part, method)[0] > 0 for _, part in documents.groupby(domain)}
        assert len(signs) == 1
    over_corpora = document_losses.change(documents, "causal dropout")[1]
    assert document_losses.error_over_units(documents, "causal dropout") > over_corpora
    cells = modules.tables.method_cells(modules.selection.Chosen(tables.runs))
    replicates = modules.tables.method_replicates(tables.runs, tables.repeated)
    for method, cell in cells.items():
        expected = replicates.values(cell, "test_causal")
        found = document_losses.losses(documents, method)
        assert found.keys() == expected.keys()
        for key, loss in found.items():
            assert loss == pytest.approx(expected[key], abs=1e-4)


def test_claims_about_infilling_hold(modules, tables):
    """A sentence of methods.md without a number, for each corpus."""
    infilling = tables.infilling
    assert set(infilling.method) == set(modules.tables.METHODS) and set(infilling.n) == {1024}
    mixed = infilling.method.str.startswith("mixture")
    by_corpus = infilling.groupby(["corpus", mixed.rename("mixed")])[["accuracy", "bits_per_byte"]]
    low, high = by_corpus.min(), by_corpus.max()
    for corpus in "BCD":
        assert low.accuracy[corpus, True] > high.accuracy[corpus, False]
        assert high.bits_per_byte[corpus, True] < low.bits_per_byte[corpus, False]


def test_the_error_over_units_is_that_of_resampled_units(modules, tables, monkeypatch):
    """Two models that differ by a constant have no error; the error of a shift of one unit is known."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import document_losses

    rng, lines = np.random.default_rng(0), []
    for corpus in "BC":
        nats_U = rng.random(40)
        for method, shift in (("mixture", 0.0), ("mir", 0.5), ("causal", 0.0)):
            for unit, nats in enumerate(nats_U):
                other = 40.0 if (method, unit) == ("causal", 7) else shift
                lines.append((method, corpus, f"web {unit}", nats + other, 1.0))
    columns = ["method", "corpus", "unit", "causal_nats", "causal_weight"]
    table = pd.DataFrame(lines, columns=columns)
    assert document_losses.change(table, "mir") == pytest.approx((0.5, 0), abs=1e-12)
    assert document_losses.error_over_units(table, "mir") == pytest.approx(0, abs=1e-12)
    assert document_losses.change(table, "causal")[0] == pytest.approx(1)
    assert document_losses.error_over_units(table, "causal") == pytest.approx(1, rel=0.1)


def test_task_scores_are_read_from_the_results_of_evaluate(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import task_scores

    found = {
        "n": 3,
        "score": 0.5,
        "metrics": {"acc": {"accuracy": 0.5}, "slor": {"accuracy": 0.4}},
        "answer": {"bits_per_byte": 2.0, "margin": -0.1},
        "baselines": {"unigram": {"score": 0.6, "bits_per_byte": 4.0}},
        "groups": {"x": {"score": 0.7, "n": 2}, "(pairs of equal length)": {"score": 0.55, "n": 1}},
    }
    for name, task in (("mixture_dropout-B", "piqa"), ("mixture_dropout-B-blimp", "blimp")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"tasks": {task: {"causal": found}}}))
    table = task_scores.read_scores(sorted(tmp_path.glob("*.json")))
    assert table.task.tolist() == ["blimp", "piqa"] and set(table.method) == {"mixture dropout"}
    assert table.iloc[0].tolist() == ["mixture dropout", "B", "blimp", 3, 2.0, -0.1, 4.0, 0.5, 0.6, 0.4, 0.55]
    paradigms = task_scores.read_paradigms([tmp_path / "mixture_dropout-B-blimp.json"])
    assert paradigms.to_numpy().tolist() == [["mixture dropout", "B", "x", 2, 0.7]]


def test_a_table_that_cannot_be_read_leaves_all_as_they_are(tmp_path, monkeypatch):
    """These results have the losses of a document, but no infilled words."""
    part = {"nats": [1.0], "weight": [2.0], "domain": ["web 1"]}
    held_out = {name: {"by_document": part} for name in ("causal", "masked_diffusion")}
    (tmp_path / "mir-B.json").write_text(json.dumps({"held_out": held_out}))
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["document_losses.py", str(tmp_path)])
    tables = {path: path.read_bytes() for path in FOLDER.glob("*.csv")}
    with pytest.raises(KeyError, match="infilling"):
        runpy.run_path(str(FOLDER / "document_losses.py"), run_name="__main__")
    assert tables == {path: path.read_bytes() for path in FOLDER.glob("*.csv")}


@pytest.mark.parametrize("script", ["task_scores", "two_sources_scores", "document_losses"])
def test_a_folder_without_results_leaves_the_table_as_it_is(script, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", str(tmp_path)])
    tables = {path: path.read_bytes() for path in FOLDER.glob("*.csv")}
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FOLDER / f"{script}.py"), run_name="__main__")
    assert end.value.code == 2 and f"error: {tmp_path} has no files" in capsys.readouterr().err
    assert tables == {path: path.read_bytes() for path in FOLDER.glob("*.csv")}


def test_the_tables_of_recommend_are_what_the_tables_give(modules, tables):
    page = modules.page
    assert modules.tables.confirmed_csv(tables.runs) == page.CONFIRMED.read_text()
    assert modules.tables.methods_csv(tables.runs, tables.repeated) == page.METHODS.read_text()
    assert modules.tables.sizes_csv(tables.runs, tables.repeated) == page.SIZES.read_text()
    assert modules.tables.DROPOUT == modules.study.DROPOUT
    assert (FOLDER / "table.csv").read_bytes() == SHIPPED.read_bytes()


def test_the_study_continues_from_its_tables(modules, tmp_path):
    study = modules.study
    results = study.read_results(FOLDER)
    study.write_tables(results, tmp_path)
    for name in ("runs.csv", "curves.csv"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
    planned = [run for R in study.ALPHAS for run in study.tuning("plain", R, study.ALPHAS[R])]
    assert {study.name_of(run) for run in planned} <= {study.name_of(result["run"]) for result in results}


def test_choices_on_the_page_are_those_of_the_study(modules, tables):
    study = modules.study
    chosen, on_page = study.choose(study.read_results(FOLDER)), modules.selection.Chosen(tables.runs)
    for R in (128, 32):
        for alpha in study.ALPHAS[R]:
            for kind in ("full", "stop"):
                run = chosen[f"plain,{R},{alpha}"][kind]["run"]
                cell = on_page.best("plain", R, alpha, kind)
                assert all(run[key] == value for key, value in cell.items())
        assert on_page.mixture(R, "full")["alpha"] == study.best_alpha(chosen, R, "full")


def test_every_confirmed_cell_has_all_replicates(modules, tables):
    confirmed = tables.runs[tables.runs.stage == "confirm"]
    for (R, *_), found in confirmed.groupby(["R", "alpha", "weight_decay", "length", "causal_weight"]):
        expected = modules.study.REPLICATES if R == 128 else modules.study.REPLICATES[::2]
        assert sorted(zip(found.corpus, found.seed, strict=True)) == sorted(expected)


def test_all_methods_have_the_same_replicates(modules, tables):
    cells = modules.tables.method_cells(modules.selection.Chosen(tables.runs))
    replicates = modules.tables.method_replicates(tables.runs, tables.repeated)
    keys = [set(replicates.values(cell, "test_causal")) for cell in cells.values()]
    assert keys == [{(corpus, 1) for corpus in "BCD"}] * 6


def test_numbers_of_runs_in_words_are_those_of_the_tables(modules, tables):
    """Corpora and seeds of the confirmed runs, and the dashed curves."""
    confirmed = tables.runs[(tables.runs.stage == "confirm") & (tables.runs.recipe == "plain")]
    assert confirmed.corpus.nunique() == 3  # "three other corpora"
    seeds = confirmed.groupby(["R", "corpus"]).seed.nunique()
    assert (seeds[128] == 2).all() and (seeds[32] == 1).all()  # "two seeds of each (one seed at R = 32)"
    dashed = tables.curves[tables.curves.weight_decay == modules.tables.FINER_DECAY]
    assert len(dashed[["corpus", "seed"]].drop_duplicates()) == 2  # "Dashed: two runs"


def test_the_protocol_states_the_runs_that_were_made(modules, tables):
    """Counts, deviations and every later addition, which the commit before the runs did not have."""
    study, runs, text = modules.study, tables.runs, words((FOLDER / "protocol.md").read_text())
    assert f"## What was run {len(runs)} runs have been made" in text
    assert "None diverged and none skipped an update" in text
    counts = modules.numbers.count_runs(runs, tables.repeated)
    assert (counts["num_diverged"], counts["num_skipped"]) == ("0", "0")
    confirmed = runs[runs.stage == "confirm"]
    assert set(confirmed.recipe) == {"plain"} and set(runs["size"]) == set(study.SIZES)
    others = runs[runs["size"] != "230k"]
    cells = others[others.stage != "explore"].groupby(["stage", "alpha", "length"]).corpus.agg("".join)
    settings = [(0.75, 1.0), (1.0, 0.25), (1.0, 1.0)]
    assert cells.to_dict() == {
        (f"size {size}", *setting): "BC" for size in ("61k", "1.0M") for setting in settings
    }
    assert words(modules.tables.added_table(runs)) in text
    results = study.read_results(FOLDER)
    explored = [result["run"] for result in results if result["stage"] == "explore"]
    planned = study.exploring(study.choose(results))
    assert {study.name_of(run) for run in explored} <= {study.name_of(run) for run in planned}
    assert set(confirmed[confirmed.R == 32].length) == {1.0}
    assert "no run at R = 32 with half the length was confirmed" in text
    others = runs[(runs.corpus != "A") & (runs.recipe != "plain")]
    assert set(others.seed) == {1}
    mir = others[others.recipe == "mir"]
    assert {length: "".join(sorted(found.corpus)) for length, found in mir.groupby("length")} == {
        0.5: "BCD",
        1.0: "BC",
    }
    added = text.split("Added after the runs: ")[1].split("additions.")[0]
    for part in ("`cut.py`", "`data.order_version`", "*What was run*", "*Added runs*", "*Commands*"):
        assert part in added


def test_commands_in_the_protocol_train_the_runs_of_the_study(modules, tables):
    study = modules.study
    blocks = (FOLDER / "protocol.md").read_text().split("## Commands")[1].replace("\\\n", " ")
    commands = [line.split() for line in blocks.splitlines() if line.startswith("dualsm train")]
    for recipe, command in zip(("plain", "dropout", "mir"), commands, strict=True):
        runs = tables.runs[tables.runs.recipe == recipe].to_dict("records")
        for row in (runs[0], runs[-1]):
            length = row["length"]
            names = {
                "R*LENGTH": round(row["R"] * length),
                "1840*LENGTH": round(1840 * length),
                "3680*LENGTH": round(3680 * length),
                "DECAY": float(row["weight_decay"]),
                "WEIGHT": float(row["causal_weight"]),
            } | {key.upper(): row[key] for key in ("alpha", "seed", "corpus")}
            flags = " ".join(command)
            for name, value in names.items():
                flags = flags.replace(name, str(value))
            pairs = dict(flag.removeprefix("--").split("=", 1) for flag in flags.split()[2:])
            config = study.get_config(pairs.pop("config").split(":")[1])
            assert pairs.pop("workdir") == "RUN"
            keys = {key.removeprefix("config."): parse_value(value) for key, value in pairs.items()}
            config.update_from_flattened_dict(keys)
            expected = study.settings_of(row, Path("runs/study"))
            expected.model.remat = config.model.remat  # the same numbers
            assert difference(config, expected, free=()) == [] and config == expected


def test_flags_in_the_protocol_are_those_of_the_other_sizes(modules):
    study, text = modules.study, (FOLDER / "protocol.md").read_text()
    rows = re.findall(
        r"^\| ([\w.]+) \| ([\d,]+) \| `(--config\.model\S+(?: --\S+)*)` \|$", text, re.MULTILINE
    )
    assert [row[0] for row in rows] == [size for size in study.SIZES if size != "230k"]
    for size, steps, flags in rows:
        config, other = (
            study.settings_of(study.cell("plain", 128, 0.75, 1.0, 1, "B", 1, name), Path("runs/study"))
            for name in ("230k", size)
        )
        pairs = dict(flag.removeprefix("--config.").split("=", 1) for flag in flags.split())
        config.update_from_flattened_dict({key: parse_value(value) for key, value in pairs.items()})
        config.steps = int(steps.replace(",", ""))
        assert config == other


def test_flags_in_the_protocol_are_those_of_the_other_recipes(modules, tables):
    study, text = modules.study, (FOLDER / "protocol.md").read_text()
    rows = re.findall(r"^\| ([\w+]+) \| (first|third) \| `--config\.([\w.]+)=(\S+)` \|$", text, re.MULTILINE)
    assert {row[0] for row in rows} >= set(tables.runs.recipe) - {"plain", "dropout", "mir"}
    for recipe, command, key, value in rows:
        base = {"first": "plain", "third": "mir"}[command]
        config, other = (
            study.settings_of(study.cell(name, 128, 0.75, 1.0, 1, "B", 1), Path("runs/study"))
            for name in (base, recipe)
        )
        config.update_from_flattened_dict({key: parse_value(value) if "," not in value else value})
        assert config == other


def test_parts_of_a_recipe_set_their_keys(modules):
    def settings(recipe):
        run = modules.study.cell(recipe, 128, 1.0, 1.0, 0.5, "B", 1)
        return modules.study.settings_of(run, Path("runs/study"))

    both, plain = settings("mir+dropout"), settings("plain")
    assert (both.mixture.mir, both.mixture.causal, both.model.dropout) == (1.0, 0.0, modules.study.DROPOUT)
    assert both.steps == 2 * plain.steps == 1840
    assert (plain.mixture.causal, plain.model.dropout) == (1.0, 0.0)
    assert settings("linear").optimizer.weight_decay_schedule.name == "linear"
    assert settings("exempt").optimizer.weight_decay_exempt == "embeddings,vectors"
    assert plain.optimizer.weight_decay_schedule.name == "learning_rate"


def test_repeated_rows_are_those_that_the_page_names(modules, tables, values):
    lines = values["methods"].splitlines()[2:]
    repeated = {tuple(row) for row in tables.repeated[["alpha", "weight_decay", "length"]].to_numpy()}
    cells = modules.tables.method_cells(modules.selection.Chosen(tables.runs)).values()
    keys = [(cell["alpha"], cell["weight_decay"], cell["length"]) for cell in cells]
    plain = [cell["recipe"] == "plain" for cell in cells]
    found = [number for number, key in enumerate(keys) if plain[number] and key in repeated]
    assert found == [0, 4] and len(lines) == len(keys)
    assert "The first and fifth row repeat GPU runs" in words(modules.page.PAGE.read_text())


def test_parameters_of_each_size_are_those_of_its_models(modules):
    for size, parameters in modules.tables.PARAMETERS.items():
        run = modules.study.cell("plain", 128, 1.0, 1.0, 1, "B", 1, size)
        config = modules.study.settings_of(run, Path())
        config.model.vocab_size = 512
        shapes = jax.eval_shape(lambda config=config: init_params(config.model, jax.random.key(0)))
        assert sum(shape.size for shape in jax.tree.leaves(shapes)) == parameters


def test_standard_errors_are_over_corpora(modules):
    values = pd.Series(
        [1.0, 3.0, 4.0, 6.0, 9.0, 9.0],
        index=pd.MultiIndex.from_product([["B", "C", "D"], [1, 2]], names=["corpus", "seed"]),
    )
    mean, error = modules.selection.over_corpora(values)  # the means of the corpora are 2, 5 and 9
    assert mean == pytest.approx(16 / 3)
    assert error == pytest.approx(((2 - 16 / 3) ** 2 + (5 - 16 / 3) ** 2 + (9 - 16 / 3) ** 2) ** 0.5 / 6**0.5)


def test_every_run_has_steps_that_a_config_can_have(modules):
    study = modules.study
    for size, (*_, steps) in study.SIZES.items():
        for length in study.LENGTHS[128]:
            assert (steps * length) % (steps // study.POINTS) == 0, size


def test_all_pieces_of_a_unit_are_in_one_part(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    import cut

    sources = [
        f"{name}/book/{unit}#{piece}/2" for name in cut.DOMAINS for unit in range(40) for piece in (1, 2)
    ]
    lines = [json.dumps({"text": source, "source": source}) for source in sources]
    (tmp_path / "all.jsonl").write_text("\n".join(lines) + "\n")
    flags = [f"--{name}={tmp_path / 'all.jsonl'}" for name in ("train", "valid")]
    monkeypatch.setattr(sys, "argv", ["cut.py", *flags, f"--output={tmp_path}"])
    cut.main()
    for names in ("ABCD", ("dev", "test")):
        parts = [list(map(json.loads, (tmp_path / f"{name}.jsonl").open())) for name in names]
        assert sorted(document["source"] for part in parts for document in part) == sorted(sources)
        units = [{cut.unit_of(document) for document in part} for part in parts]
        assert sum(map(len, units)) == len(set.union(*units)) == len(sources) / 2
        assert {d["domain"] for part in parts for d in part} == {"books", "textbooks", "web", "speeches"}
    assert f"test: {2 * len(units[1])} documents of {len(units[1])} units: " in capsys.readouterr().out
