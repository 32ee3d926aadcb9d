"""Rows of .csv files, quoted as in RFC 4180, and of .tsv files, which are not quoted, with a header."""

from __future__ import annotations

import csv
import enum
import io
import itertools
import re
from collections.abc import Iterator

from dualsm.data.domains import Labeled
from dualsm.data.faults import Fault
from dualsm.data.fields import join, listed, names_of
from dualsm.data.text import without_bom
from dualsm.process.errors import UserError

DELIMITERS = {"csv": ",", "tsv": "\t"}
_ROW_BYTES_PER_TEXT_BYTE = 4  # rows may have other columns and doubled quotes
_MIN_ROW_BYTES = 1 << 20
_MARKS = re.compile(rb'[",\n]')  # of .csv files
_UNCLOSED = "the file ends inside a quoted value"


def read_rows(
    stream: io.BufferedIOBase,
    path: str,
    delimiter: str,
    text_key: str,
    max_bytes: int,
    domain_key: str = "",
) -> Iterator[bytes | Labeled | None | Fault]:
    """Yields the text of each row after the header, in the encoding of the file.

    A malformed row is one fault per line, and a row that is too long one None per line, because an unpaired
    quote joins the lines of many rows. Such rows are never held in memory completely. Texts that are too long
    are None. Blank lines are skipped.

    Args:
      stream: the decompressed file.
      path: its path, for messages.
      delimiter: character between columns.
      text_key: names of columns, separated by commas.
      max_bytes: maximum size of a text.
      domain_key: name of the column with the domain, which is yielded with the text; "": only the text.

    Raises:
      UserError: if the header lacks a column.
      EOFError: if the file ends inside a quoted value.
    """
    limit = max(_MIN_ROW_BYTES, _ROW_BYTES_PER_TEXT_BYTE * max_bytes)
    csv.field_size_limit(limit)
    header: list[str] | None = None
    for row, num_lines in _rows(stream, delimiter, limit):
        if header is None:
            if isinstance(row, Fault) or row is None:
                raise UserError(f"{path}: the header is malformed ({row or 'too long'}); check the file")
            header = row
            indices = [_index(path, header, name) for name in names_of(text_key, header)]
            domain_index = _index(path, header, domain_key, "--domain_key") if domain_key else None
        elif row is None:
            yield from itertools.repeat(None, num_lines)
        elif isinstance(row, Fault):
            yield from itertools.repeat(row, num_lines)
        elif len(row) != len(header):
            fault = Fault("bad_csv", f"{len(row)} columns, but the header has {len(header)}")
            yield from itertools.repeat(fault, num_lines)
        else:
            text = join(row[index] for index in indices).encode("utf-8", "surrogateescape")
            if len(text) > max_bytes:
                yield None
            else:
                yield text if domain_index is None else Labeled(text, row[domain_index])


def _index(path: str, header: list[str], name: str, flag: str = "--text_key") -> int:
    if name not in header:
        columns = listed(map(repr, header))
        raise UserError(f"{path} has no column {name!r}; set {flag} to one of {columns}")
    if header.count(name) > 1:
        raise UserError(f"{path} has several columns {name!r}; rename all but one of them")
    return header.index(name)


class _RowTooLong(Exception):
    """Raised inside a CSV reader, which cannot be used afterwards."""


class _State(enum.Enum):
    """State of a parser of CSV; a quotation mark in a field that does not start with one is text."""

    FIELD_START = enum.auto()
    UNQUOTED = enum.auto()
    QUOTED = enum.auto()
    CLOSED = enum.auto()  # after a quote in a quoted field, which another quote continues

    def after(self, data: bytes) -> _State:
        """Returns the state after further bytes."""
        state, position = self, 0
        for mark in _MARKS.finditer(data):
            if mark.start() > position and state in (_State.FIELD_START, _State.CLOSED):
                state = _State.UNQUOTED
            position = mark.end()
            if mark[0] != b'"':
                state = state if state is _State.QUOTED else _State.FIELD_START
            elif state in (_State.FIELD_START, _State.CLOSED):
                state = _State.QUOTED
            elif state is _State.QUOTED:
                state = _State.CLOSED
        if position < len(data) and state in (_State.FIELD_START, _State.CLOSED):
            state = _State.UNQUOTED
        return state


class _Lines:
    """Iterates over the lines of a stream, and limits their total size between calls of `start_row`.

    Attributes:
      count: number of lines since the last call of `start_row`.
    """

    def __init__(self, stream: io.BufferedIOBase, limit: int, quoted: bool):
        self._stream, self._limit, self._quoted, self._first = stream, limit, quoted, True
        self.start_row()

    def start_row(self) -> None:
        self._row: list[bytes] = []
        self._size = self.count = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(self._limit - self._size + 1)
        if not line:
            raise StopIteration
        self._row.append(line)
        self._size += len(line)
        self.count += 1
        if self._size > self._limit:
            self._skip_row()
            raise _RowTooLong
        line, self._first = without_bom(line) if self._first else line, False
        return line.decode("utf-8", "surrogateescape")

    def _skip_row(self) -> None:
        """Reads to the first line end that is not inside a quoted value."""
        state, line = _State.FIELD_START, b""
        for line in self._row:
            state = state.after(line) if self._quoted else state
        while state is _State.QUOTED or not line.endswith(b"\n"):
            self.count += line.endswith(b"\n")
            line = self._stream.readline(self._limit)
            if not line:
                if state is _State.QUOTED:
                    raise EOFError(_UNCLOSED)
                return
            state = state.after(line) if self._quoted else state


def _rows(
    stream: io.BufferedIOBase, delimiter: str, limit: int
) -> Iterator[tuple[list[str] | None | Fault, int]]:
    """Yields each row, or its fault, with its number of lines."""
    quoted = delimiter == DELIMITERS["csv"]
    lines = _Lines(stream, limit, quoted)
    options = {"delimiter": delimiter, "strict": True}
    options["quoting"] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader(lines, **options)
    while True:
        lines.start_row()
        try:
            row = next(reader)
        except StopIteration:
            return
        except _RowTooLong:
            reader = csv.reader(lines, **options)
            yield None, lines.count
        except csv.Error as error:
            if str(error) == "unexpected end of data":
                raise EOFError(_UNCLOSED) from error
            size = f", in a row of {lines.count} lines" if lines.count > 1 else ""
            yield Fault("bad_csv", f"{error}{size}"), lines.count
        else:
            if row:
                yield row, lines.count
