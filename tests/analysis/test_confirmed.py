"""Answers of the confirmed runs."""

import pytest

from dualsm.analysis.advice import round_repetitions
from dualsm.analysis.confirmed import (
    ConfirmedCell,
    answer,
    describe_confirmed,
    half_interval,
    read_confirmed,
)
from dualsm.analysis.methods import read_methods
from dualsm.analysis.sizes import read_sizes


def cell(repetitions, alpha, length, causal, masked, roles):
    unique = 1000 // repetitions
    changes = (causal - 2.6, 0.04, masked - 5.0, 0.01)
    return ConfirmedCell(
        *(repetitions, unique, 1000, 50, alpha, 0.5, length, 6, 0, 3),
        *(causal, 0.03, masked, 0.02, 3, *changes, roles),
    )


CELLS = [
    cell(8, 0.5, 1.0, 2.5, 4.0, "mixture"),
    cell(8, 0.75, 0.5, 2.7, 4.5, "second_mode"),
    cell(8, 1.0, 1.0, 2.9, 6.0, "causal"),
    cell(8, 1.0, 0.25, 2.6, 5.0, "causal_stop"),
    cell(2, 0.5, 1.0, 2.0, 4.0, "mixture second_mode"),
    cell(2, 1.0, 1.0, 1.5, 5.0, "causal causal_stop"),
]


def ask(unique, budget, **kwargs):
    return answer(round_repetitions(unique, budget), cells=CELLS, **kwargs)


def test_the_nearest_repetitions_are_used():
    assert ask(200, 1000).mixture.repetitions == 8  # 5 is nearer to 8 than to 2, in doublings
    assert ask(333, 1000).mixture.repetitions == 2
    assert ask(250, 1000).mixture.repetitions == 8  # of two equally near ones, the larger


def test_a_cell_with_two_roles_is_described_once():
    start = "    causal rows only"
    assert sum(line.startswith(start) for line in describe_confirmed(ask(500, 1000))) == 1
    assert sum(line.startswith(start) for line in describe_confirmed(ask(125, 1000))) == 2


def test_flags_are_those_of_the_question():
    text = "\n".join(describe_confirmed(ask(1e9, 1e9)))
    assert (
        "--config.mixture.causal=0.5 --config.mixture.prefix=0.0 --config.mixture.masked_diffusion=0.5"
        in text
    )
    assert "--config.repetitions=1 --config.optimizer.weight_decay=0.5" in text


def test_distance_is_in_doublings_per_dimension():
    found = ask(4000, 16 * 4000, parameters=200)  # R = 16, 8 times the unique tokens
    assert found.outside == pytest.approx(
        {"repetitions": 1, "unique_tokens": 3, "budget_tokens": 6, "parameters": 2}, abs=0.01
    )
    assert "repetitions by 1.0, unique tokens by 3.0" in "\n".join(describe_confirmed(found))
    assert "parameters" not in ask(500, 1000).outside
    assert ask(1e9, 1000).outside == ask(1000, 1000).outside  # a run sees no more tokens than it trains on


def test_repetitions_between_those_of_the_runs_are_outside():
    assert ask(250, 1000).outside["repetitions"] == 1
    assert ask(125, 1000).outside["repetitions"] == 0


def test_the_price_compares_the_best_stops():
    text = "\n".join(describe_confirmed(ask(125, 1000)))
    assert (  # with three corpora, half an 80% interval is 1.886 standard errors
        "causal 3/4 changes the causal loss by +0.100 ± 0.075 and the masked-diffusion loss by -0.500 ± 0.019"
        in text
    )
    assert "causal and masked-diffusion loss: 2.500 ± 0.057 and 4.000 ± 0.038" in text
    assert "warning" not in text and "diverged" not in text


def test_runs_that_diverged_are_named():
    cells = [cell._replace(diverged=2) if "mixture" in cell.roles else cell for cell in CELLS]
    lines = describe_confirmed(answer(round_repetitions(125, 1000), cells=cells))
    assert [line.endswith(" (2 of 6 runs diverged)") for line in lines].count(True) == 1


def test_the_shipped_table_answers_at_both_numbers_of_repetitions():
    cells = read_confirmed()
    assert {c.repetitions for c in cells} == {32, 128}
    assert all(c.unique_tokens * c.repetitions == c.budget_tokens for c in cells)
    for repetitions in (32, 128):
        found = answer(round_repetitions(1e6, repetitions * 1e6))
        assert found.mixture.repetitions == repetitions and found.mixture.alpha < 1


def test_other_methods_are_stated_from_the_table():
    methods, lines = read_methods(), describe_confirmed(answer(round_repetitions(1e6, 128e6)))
    (start,) = (i for i, line in enumerate(lines) if line.startswith("    other methods (R = 128, "))
    names = {
        "causal dropout": "causal rows only, dropout 0.1, ",
        "mixture dropout": "mixture, causal 3/4, dropout 0.1, ",
        "causal finer": "causal rows only, weight decay 1.4, ",
        "mir": "MIR (each row a second time, with masked inputs), ",
    }
    for (name, beginning), line in zip(names.items(), lines[start + 1 : start + 5], strict=True):
        method = methods[name]
        assert line.strip().startswith(beginning)
        stop = "1/2 of the tokens, 1 x the compute of a full run: " if name == "mir" else "no early stop: "
        assert f"weight decay {method.weight_decay:g}, {stop}" in line
        losses = ((method.causal, method.causal_error), (method.masked, method.masked_error))
        stated = [f"{loss:.3f} ± {half_interval(error, method.corpora):.3f}" for loss, error in losses]
        change = half_interval(method.causal_change_error, method.corpora)
        assert line.endswith(f"{' and '.join(stated)}; change {method.causal_change:+.3f} ± {change:.3f}")


def test_every_size_is_stated_from_the_table():
    sizes, lines = read_sizes(), describe_confirmed(answer(round_repetitions(1e6, 128e6)))
    (start,) = (i for i, line in enumerate(lines) if line.startswith("    by size (R = 128, "))
    assert [size.parameters for size in sizes] == [61_088, 230_336, 1_001_088]
    for size, line in zip(sizes, lines[start + 1 : start + 4], strict=True):
        assert line.strip() == (
            f"{size.parameters:,} parameters, {size.budget_tokens:,} tokens, {size.corpora} corpora: "
            f"{size.compute_lowest:+.3f} to {size.compute_highest:+.3f} at equal compute, "
            f"{size.stop_lowest:+.3f} to {size.stop_highest:+.3f} each at its best stop"
        )
