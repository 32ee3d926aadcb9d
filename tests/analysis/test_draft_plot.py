"""The figure of drafts shows every token in order, in its style, with legible characters only."""

import warnings

import pytest

from dualsm.analysis import draft_plot
from dualsm.analysis.draft_plot import label, plot_drafts
from dualsm.data.sentencepiece_tokenizer import train_tokenizer
from dualsm.generation.draft_counts import DraftStep


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer(documents[:200], 512)


@pytest.fixture(scope="module")
def ids(tokenizer):
    return lambda text: tokenizer.encode([text], inside=True)[0]


def drawn(figure):
    """Returns the texts of the figure by row, without the legend; boxes are (text, face color)."""
    (axes,) = figure.axes
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a missing glyph
        figure.canvas.draw()
    boxes = {_rounded(patch.get_center()): patch.get_facecolor() for patch in axes.patches}
    rows = {}
    for text in axes.texts:
        center = text.get_position()
        rows.setdefault(center[1], []).append((text.get_text(), boxes.get(_rounded(center))))
    _, *shown = rows.values()
    return shown


def _rounded(center):
    return tuple(round(float(x), 6) for x in center)


def rgba(style):
    return pytest.importorskip("matplotlib.colors").to_rgba(style.face)


def test_every_token_is_drawn_in_order_and_in_its_style(tokenizer, ids):
    special, (a, b, c, d) = tokenizer.special, ids("abcd")[:4]
    prompt = [special.bos, *tokenizer.encode(["def"])[0]]
    steps = [DraftStep([a], [b, c], d), DraftStep([a, b], [], c), DraftStep([d, special.eos], [a], None)]
    figure = plot_drafts(tokenizer, prompt, steps)
    (first, *boxes), *rows = drawn(figure)
    assert first == ("prompt", None)
    assert "".join(text for text, _ in boxes) == "def"
    styles = draft_plot._STYLES
    accepted, rejected, unused, next_ = map(rgba, styles.values())
    piece = {token: label(tokenizer, token) for token in (a, b, c, d, special.eos)}
    assert piece[special.eos] == "</s>"
    expected = [
        [("1", None), (piece[a], accepted), (piece[b], rejected), (piece[c], unused), (piece[d], next_)],
        [("2", None), (piece[a], accepted), (piece[b], accepted), (piece[c], next_)],
        [("3", None), (piece[d], accepted), (piece[special.eos], accepted), (piece[a], unused)],
    ]
    assert rows == expected
    assert len(figure.axes[0].lines) == 2  # strikes out the rejected token, and the legend's


def test_styles_differ_without_colors():
    """By weight, line through the text, line style, or lightness of the box."""
    colors = pytest.importorskip("matplotlib.colors")

    def lightness(style):
        return round(sum(colors.to_rgba(style.face)[:3]) / 3, 1)

    styles = draft_plot._STYLES.values()
    assert len({(s.weight, s.struck, s.line, lightness(s)) for s in styles}) == len(styles)


def luminance(color):
    """Relative luminance, as in the Web Content Accessibility Guidelines."""
    channels = pytest.importorskip("matplotlib.colors").to_rgba(color)[:3]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", draft_plot._STYLES)
def test_text_has_enough_contrast(name):
    style = draft_plot._STYLES[name]
    dark, light = sorted([luminance(style.face), luminance(style.text)])
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_whitespace_is_visible_and_unknown_characters_are_escaped(tokenizer, ids, documents):
    labels = ["".join(label(tokenizer, token) for token in ids(text)) for text in (" x\n", "$x$ <b>", "\t")]
    assert labels == ["\u2423x\u21b5", "$x$\u2423<b>", "\\t"]
    assert "".join(label(tokenizer, token) for token in ids("\u4e2d")) == "<0xE4><0xB8><0xAD>"
    chinese = train_tokenizer(["\u4e2d\u6587" * 9] * 50 + documents[:200], 512)
    (token,) = [t for t in range(chinese.vocab_size) if chinese.piece(t) == "\u4e2d"]
    assert label(chinese, token) == "\\u4e2d"
    drawn(plot_drafts(chinese, [2, token], [DraftStep([token], ids("$x$"), token)]))


def test_long_rows_are_wrapped(tokenizer, ids):
    tokens = ids("function " * 40)
    figure = plot_drafts(tokenizer, [2], [DraftStep(tokens[:60], tokens[60:], None)])
    _, *lines = drawn(figure)
    assert len(lines) > 2
    assert [text for line in lines for text, _ in line if text not in ("1", "")] == [
        label(tokenizer, token) for token in tokens
    ]
    edges = [patch.get_x() + patch.get_width() for patch in figure.axes[0].patches]
    assert max(edges) <= draft_plot._WIDTH
