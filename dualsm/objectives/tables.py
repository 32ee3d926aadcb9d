"""Prints the tables of docs/objectives.md: `python -m dualsm.objectives.tables`."""

from __future__ import annotations

from dualsm.objectives.registry import OBJECTIVES


def objectives_table() -> str:
    """Returns a Markdown table with one row per objective."""
    rows = [
        (f"`{name}`", row.sees, row.predicts, row.averages_over) for name, row in OBJECTIVES.items()
    ]  # fmt: skip
    return _markdown(("objective", "sees", "position i predicts", "loss is the mean over"), rows)


def options_table(name: str) -> str:
    """Returns a Markdown table with one row per option of an objective."""
    row = OBJECTIVES[name]
    rows = [
        (f"`{key}`", f"`{row.defaults[key]!r}`", option.rule.text.removeprefix("be "), option.doc)
        for key, option in row.options.items()
    ]
    return _markdown(("option", "default", "range", "description"), rows)


def mode_tokens_table() -> str:
    """Returns a Markdown table with one row per mode token or sentinel."""
    rows = [
        (str(token), f"`{token_name}`", f"`{name}`")
        for name, row in OBJECTIVES.items()
        for token_name, token in row.mode_tokens.items()
    ]
    return _markdown(("id", "token", "objective"), sorted(rows, key=lambda row: int(row[0])))


def _markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    tables = [objectives_table(), *(options_table(name) for name, row in OBJECTIVES.items() if row.options)]
    print("\n".join([*tables, mode_tokens_table()]))


if __name__ == "__main__":
    main()
