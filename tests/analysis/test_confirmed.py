"""Answers of the confirmed runs."""

import pytest

from dualsm.analysis.confirmed import ConfirmedCell, answer, describe_confirmed, read_confirmed


def cell(repetitions, alpha, length, causal, masked=4.0):
    return ConfirmedCell(
        repetitions, 1000 // repetitions, 1000, 50, alpha, 0.5, length, 6, causal, 0.01, masked, 0.02
    )


CELLS = [
    cell(8, 0.5, 1.0, 3.0),
    cell(8, 0.75, 1.0, 2.5),
    cell(8, 0.75, 0.5, 2.4),
    cell(8, 1.0, 1.0, 2.9, 6.0),
    cell(8, 1.0, 0.25, 2.6, 5.0),
    cell(2, 0.5, 1.0, 2.0),
    cell(2, 1.0, 1.0, 1.5),
    cell(2, 1.0, 0.5, 1.6),
]


def test_the_nearest_repetitions_and_the_lowest_loss_are_chosen():
    found = answer(1000 / 5, 1000, cells=CELLS)  # 5 is nearer to 8 than to 2, in doublings
    assert (found.mixture.repetitions, found.mixture.alpha, found.mixture.length) == (8, 0.75, 0.5)
    assert found.causal_stopped.length == 0.25
    assert found.causal_only.causal == 2.9
    assert (found.second_mode.alpha, found.second_mode.length) == (0.75, 1.0)


def test_a_stop_that_is_worse_is_left_out():
    found = answer(500, 1000, cells=CELLS)
    assert found.causal_stopped is None
    assert not any("stopped" in line for line in describe_confirmed(found))


def test_distance_is_in_doublings_per_dimension():
    found = answer(4000, 16 * 4000, parameters=200, cells=CELLS)  # R = 16, 8 times the unique tokens
    assert found.outside == pytest.approx(
        {"repetitions": 1, "unique_tokens": 3, "budget_tokens": 6, "parameters": 2}, abs=0.01
    )
    assert "repetitions by 1.0, unique tokens by 3.0" in "\n".join(describe_confirmed(found))
    assert "parameters" not in answer(500, 1000, cells=CELLS).outside


def test_text_has_the_flags_and_the_price():
    text = "\n".join(describe_confirmed(answer(125, 1000, cells=CELLS)))
    assert "--config.mixture.causal=0.75 --config.mixture.masked_diffusion=0.25" in text
    assert "--config.optimizer.weight_decay=0.5 --config.repetitions=4" in text
    assert "causal 3/4 changes the causal loss by -0.400 and the masked-diffusion loss by -2.00" in text
    assert "warning" not in text


def test_the_shipped_table_has_both_numbers_of_repetitions():
    cells = read_confirmed()
    assert {c.repetitions for c in cells} == {32, 128}
    assert all(c.unique_tokens * c.repetitions == c.budget_tokens for c in cells)
