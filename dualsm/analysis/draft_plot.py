"""A figure of a text that self-speculative decoding drafts and verifies, token by token."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from dualsm.analysis.analysis_errors import analysis_extra
from dualsm.data.tokenizer import RESERVED_IDS, Tokenizer
from dualsm.generation.draft_counts import DraftStep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FONT = "DejaVu Sans Mono"  # part of matplotlib; each character is about 0.61 times the font size wide
_FONT_SIZE = 9  # points
_CHARACTER, _LINE = 0.61 * _FONT_SIZE / 72, 2.5 * _FONT_SIZE / 72  # inches
_MARGIN, _WIDTH = 8, 88  # characters before the tokens, and of the longest line
_PADDING, _GAP = 0.4, 0.6  # characters, inside and between boxes
_VISIBLE = str.maketrans({" ": "\N{OPEN BOX}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"})


class _Style(NamedTuple):
    """Colors of a token; a second property, such as the weight, distinguishes each style without colors."""

    face: str
    edge: str
    text: str
    weight: str = "normal"
    line: str = "-"
    struck: bool = False


_PROMPT = _Style("white", "0.75", "black")
_STYLES = {
    "accepted": _Style("#0072B2", "#0072B2", "white", weight="bold"),
    "rejected": _Style("white", "#D55E00", "#A04600", struck=True),
    "after a rejected token": _Style("0.94", "0.55", "0.35", line=":"),
    "drawn next": _Style("#F0E442", "black", "black"),
}
_ACCEPTED, _REJECTED, _UNUSED, _DRAWN = _STYLES.values()


def plot_drafts(tokenizer: Tokenizer, prompt: Sequence[int], steps: Sequence[DraftStep]) -> Figure:
    """Draws the drafts of one text: a legend, the prompt, and one row per draft.

    Spaces and line breaks in tokens are visible characters. Characters that the font lacks are escaped.

    Args:
      tokenizer: the tokenizer.
      prompt: token ids of the prompt; `<s>` is not drawn.
      steps: the drafts, such as `DraftRecord.steps[0]`.
    """
    with analysis_extra():
        from matplotlib.figure import Figure

    special = tokenizer.special
    tokens = [token for token in prompt if token != special.bos]
    rows = [("", list(_STYLES.items()))]
    rows.append(("prompt", [(label(tokenizer, t, inside=i > 0), _PROMPT) for i, t in enumerate(tokens)]))
    for number, step in enumerate(steps, 1):
        rows.append((str(number), [(label(tokenizer, t), style) for t, style in _styled(step, special.eos)]))
    lines = [(name if i == 0 else "", line) for name, boxes in rows for i, line in enumerate(_wrap(boxes))]
    width = max(x + _box_width(text) for _, line in lines for x, text, _ in line) + 1
    figure = Figure(figsize=((_MARGIN + width) * _CHARACTER, (len(lines) + 0.5) * _LINE), dpi=130)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-_MARGIN, width), ylim=(len(lines) - 0.4, -0.9))
    axes.axis("off")
    for row, (name, line) in enumerate(lines):
        y = row or -0.4  # the legend is above the rest
        _write(axes, -_MARGIN + 1, y, name, color="0.35")
        for x, text, style in line:
            _draw_box(axes, x, y, text, style)
    return figure


def label(tokenizer: Tokenizer, token: int, inside: bool = True) -> str:
    """Returns the text of one token, with visible spaces and line breaks; `</s>` and the like by name.

    Args:
      tokenizer: the tokenizer.
      token: the id.
      inside: False for the first token of a text, whose leading space may not belong to the text.
    """
    text = tokenizer.decode([token], inside) if token >= RESERVED_IDS else ""
    if not text or "\N{REPLACEMENT CHARACTER}" in text:  # a special id, or a part of a character
        text = tokenizer.piece(token)
    known = _font_characters()
    visible = text.translate(_VISIBLE)
    return "".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in visible)


def _styled(step: DraftStep, eos: int) -> Iterator[tuple[int, _Style]]:
    """Yields the tokens of a step with their styles."""
    yield from ((token, _ACCEPTED) for token in step.accepted)
    is_ended = step.accepted[-1:] == [eos]
    for i, token in enumerate(step.rejected):
        yield token, _UNUSED if i or is_ended else _REJECTED
    if step.next_token is not None:
        yield step.next_token, _DRAWN


def _wrap(boxes: Sequence[tuple[str, _Style]]) -> list[list[tuple[float, str, _Style]]]:
    """Places boxes on lines, as (left edge, text, style)."""
    lines, x = [[]], 0.0
    for text, style in boxes:
        width = _box_width(text)
        if lines[-1] and x + width > _WIDTH:
            lines.append([])
            x = 0.0
        lines[-1].append((x, text, style))
        x += width + _GAP
    return lines


def _box_width(text: str) -> float:
    return len(text) + 2 * _PADDING


def _draw_box(axes: Axes, x: float, y: float, text: str, style: _Style) -> None:
    with analysis_extra():
        from matplotlib.patches import Rectangle

    width = _box_width(text)
    colors = {"facecolor": style.face, "edgecolor": style.edge, "linestyle": style.line}
    axes.add_patch(Rectangle((x, y - 0.36), width, 0.72, **colors))
    _write(axes, x + width / 2, y, text, color=style.text, weight=style.weight, ha="center")
    if style.struck:
        axes.plot([x, x + width], [y, y], color=style.edge, linewidth=1)


def _write(axes: Axes, x: float, y: float, text: str, **options) -> None:
    options |= {"family": _FONT, "size": _FONT_SIZE, "va": "center_baseline", "parse_math": False}
    axes.text(x, y, text, **options)


@functools.cache
def _font_characters() -> dict[int, int]:
    """Returns the glyph of each code point of the font."""
    with analysis_extra():
        from matplotlib import font_manager

    return font_manager.get_font(font_manager.findfont(_FONT)).get_charmap()
