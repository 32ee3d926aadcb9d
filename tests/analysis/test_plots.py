"""The plots show their data at the right positions, with readable ticks."""

import numpy as np
import pytest

from dualsm.analysis import plots
from dualsm.analysis.scales import alpha_scale

REPETITIONS, ALPHAS = np.array([1.0, 4, 16, 64]), np.array([0, 1 / 64, 1 / 2, 1])
SCORE_AXG = np.arange(16.0).reshape(4, 4)


@pytest.fixture
def figure():
    return plots.new_figure(6, 4)


def tick_labels(axis):
    return dict(zip(axis.get_ticklocs(), [t.get_text() for t in axis.get_ticklabels()], strict=True))


def drawn(figure):
    """Renders the figure, so that errors during drawing fail the test."""
    figure.draw_without_rendering()
    return figure


def surface(figure, cells, **options):
    options = {"unit": "nats", "lower_is_better": True} | options
    axes = figure.subplots()
    plots.plot_surface(axes, REPETITIONS, ALPHAS, SCORE_AXG, cells, **options)
    drawn(figure)
    return axes


def test_surface_shows_every_tried_cell_at_its_position_and_color(figure):
    cells = ([1, 1, 16, 64], [0, 1 / 64, 1 / 2, 1], [3.0, 7.0, 5.0, 11.0])
    axes = surface(figure, cells)
    [points] = [c for c in axes.collections if c.get_label() == "tried cells"]
    np.testing.assert_allclose(points.get_offsets(), np.stack([np.log2(cells[0]), alpha_scale(cells[1])], 1))
    np.testing.assert_array_equal(points.get_array(), cells[2])
    filled = axes.collections[0]
    assert points.get_clim() == filled.get_clim()  # equal scores have equal colors
    assert points.get_cmap() == filled.get_cmap()


def test_surface_ticks_are_the_tried_values(figure):
    axes = surface(figure, ([1, 4, 64], [0, 1 / 64, 1], [1.0, 2.0, 3.0]))
    assert tick_labels(axes.xaxis) == {0.0: "1", 2.0: "4", 6.0: "64"}
    assert list(tick_labels(axes.yaxis).values()) == ["0", "1/64", "1"]
    assert "alpha" in axes.get_ylabel()
    assert "repetitions" in axes.get_xlabel()
    bars = [a.get_ylabel() for a in figure.axes if a is not axes]
    assert bars == ["nats (bright is better)"]


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_best_alpha_is_marked_and_bright(figure, lower_is_better):
    axes = surface(figure, ([1, 4], [0, 1], [1.0, 2.0]), lower_is_better=lower_is_better)
    [line] = [line for line in axes.lines if line.get_label().startswith("best alpha")]
    best = ALPHAS[0] if lower_is_better else ALPHAS[-1]  # the scores rise with alpha
    np.testing.assert_allclose(line.get_ydata(), alpha_scale(best))
    filled = axes.collections[0]
    good, bad = (0, 15) if lower_is_better else (15, 0)
    brightness = [sum(filled.cmap(filled.norm(score))[:3]) for score in (good, bad)]
    assert brightness[0] > brightness[1] + 1


def test_a_diverged_cell_does_not_dominate_the_colors(figure):
    score = SCORE_AXG.copy()
    score[-1, -1] = 1e6
    levels, extend = plots._levels(score.ravel(), lower_is_better=True)
    assert extend == "max"
    assert levels[0] <= 0
    assert 10 < levels[-1] < 40


def test_a_diverged_curve_does_not_dominate_the_y_axis():
    tokens = [1, 2]
    curves = [(tokens, [9.0, 3.0 + loss]) for loss in (0, 0.1, 0.2, 0.3)] + [(tokens, [5.0, 40.0])]
    low, high = plots._loss_limits(curves)
    assert 2.8 < low < 3
    assert 3.3 < high < 5


def test_best_alpha_plot_shows_the_probabilities(figure):
    probability = np.eye(4)
    intervals = [(0, 1 / 64), (1 / 64, 1 / 2), (1 / 2, 1 / 2), (1 / 2, 1)]
    axes = figure.subplots()
    plots.plot_best_alpha(axes, REPETITIONS, ALPHAS, probability, intervals, level=0.8)
    drawn(figure)
    [mesh] = [c for c in axes.collections if c.get_array() is not None]
    np.testing.assert_array_equal(mesh.get_array().reshape(4, 4), probability)
    low, high = (line.get_ydata() for line in axes.lines)
    np.testing.assert_allclose(np.stack([low, high], 1), alpha_scale(np.array(intervals)))
    assert "80%" in axes.get_legend().get_texts()[0].get_text()
    assert list(tick_labels(axes.xaxis).values()) == ["1", "2", "4", "8", "16", "32", "64"]


def test_curves_have_one_panel_per_r_and_one_color_per_alpha(figure):
    tokens = [1e6, 2e6]
    curves = {
        "causal": {
            1: {0.5: [(tokens, [3.0, 2.0]), (tokens, [3.1, 2.1])], 1.0: [(tokens, [2.5, 1.5])]},
            64: {1.0: [(tokens, [2.5, 9.0])]},
        },
        "masked_diffusion": {64: {0.5: [(tokens, [4.0, 3.0])]}},
    }
    plots.plot_curves(figure, curves)
    panels = np.array(drawn(figure).axes).reshape(2, 2)
    assert [axes.get_title() for axes in panels[0]] == ["R = 1", "R = 64"]
    assert [axes.get_ylabel().split()[0] for axes in panels[:, 0]] == ["causal", "masked_diffusion"]
    assert [[len(axes.lines) for axes in row] for row in panels] == [[3, 1], [0, 1]]
    np.testing.assert_allclose(panels[0, 1].lines[0].get_xydata(), [[1, 2.5], [2, 9]])
    half, half_again, one = (tuple(line.get_color()) for line in panels[0, 0].lines)
    assert half == half_again == tuple(panels[1, 1].lines[0].get_color())
    assert one == tuple(panels[0, 1].lines[0].get_color()) != half
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["1/2", "1"]
    assert legend.get_lines()[0].get_color() is not None


@pytest.mark.parametrize(
    ("cost", "label"), [("tokens", "tokens seen, millions"), ("flops", "compute, PFLOP")]
)
def test_curves_are_over_tokens_or_compute(figure, cost, label):
    plots.plot_curves(figure, {"causal": {1: {1.0: [([1e15, 3e15], [3.0, 2.0])]}}}, cost=cost)
    [axes] = drawn(figure).axes
    scale = 1e-6 if cost == "tokens" else 1e-15
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [1e15 * scale, 3e15 * scale])
    assert label in " ".join([axes.get_xlabel(), figure.get_supxlabel()])


def test_gap_table_shows_numbers_and_dashes(figure):
    gap = np.array([[np.nan, 0.5], [-0.001, 2.0]])
    axes = figure.subplots()
    plots.plot_gap(axes, [1, 64], [0, 63 / 64], gap, top=1.0, label="nats")
    drawn(figure)
    places = {text.get_position(): text.get_text() for text in axes.texts}
    assert places == {(0, 0): "–", (1, 0): "0.50", (0, 1): "0.00", (1, 1): "2.00"}
    np.testing.assert_array_equal(np.ma.filled(axes.images[0].get_array(), np.nan), gap)
    assert list(tick_labels(axes.xaxis).values()) == ["1", "64"]
    assert list(tick_labels(axes.yaxis).values()) == ["0", "63/64"]
