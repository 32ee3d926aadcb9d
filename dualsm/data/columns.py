"""Text columns of .parquet and .arrow files, read in batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from dualsm.data.domains import Labeled
from dualsm.data.fields import SEPARATOR, listed, names_of
from dualsm.process.errors import UserError
from dualsm.process.urls import file_name

_BATCH_ROWS = 256  # rows per batch of a .parquet file


def read_columns(
    file: str | BinaryIO, text_key: str, max_bytes: int, name: str, domain_key: str = ""
) -> Iterator[tuple[list[bytes | Labeled | None], int]]:
    """Yields batches of texts, and the bytes of the file that each batch represents.

    Texts are UTF-8; null values are b"", and texts longer than `max_bytes` are None.

    Args:
      file: a .parquet file, or an .arrow file in the stream format (written by `datasets`) or the file format
        (Feather 2): a local path, or an open file with `seek`. Only the columns that are needed are read from
        a .parquet file.
      text_key: names of columns, separated by commas, whose values are joined; `a.b` is the field `b` of the
        column of structs `a`, unless a column is named `a.b`.
      max_bytes: maximum size of a text.
      name: path or URL of the file, for its suffix and for messages.
      domain_key: name of the column with the domain, which is yielded with the text; "": only the text.

    Raises:
      UserError: if pyarrow is not installed, or if the file is damaged or has no such text column.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f"reading {name} needs pyarrow: pip install 'dualsm[parquet]'") from error
    batches = _parquet_batches if file_name(name).lower().endswith(".parquet") else _arrow_batches
    size = remaining = _size(file)
    try:
        for columns, domains, fraction in batches(file, text_key, name, domain_key):
            consumed = min(remaining, round(size * fraction))
            remaining -= consumed
            texts = _texts([_as_bytes(column, values) for column, values in columns], max_bytes)
            yield _label(texts, _domains(domain_key, domains)) if domains is not None else texts, consumed
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read {name}: {error}") from error
    except _NotText as error:
        raise UserError(f"{name}: {error}") from error


def _size(file: str | BinaryIO) -> int:
    if isinstance(file, str):
        return os.stat(file).st_size
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size


class _NotText(ValueError):
    """Raised for a column that does not contain text."""


def _as_bytes(name: str, values):
    """Casts values to binary, and checks their offsets, which may be out of bounds in a damaged file."""
    import pyarrow

    # The view as binary comes first: validating strings would reject all values if one is not UTF-8.
    views = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    try:
        values = values.view(views.get(values.type, values.type))
        values.validate(full=True)
        return values.cast(pyarrow.large_binary())
    except pyarrow.ArrowNotImplementedError as error:
        raise _NotText(f"the column {name!r} is not text ({error}); set --text_key") from error


def _texts(columns: list, max_bytes: int) -> list[bytes | None]:
    """Joins the values of each row; None for rows longer than `max_bytes`."""
    if len(columns) == 1:
        return [_value(value, max_bytes) for value in columns[0]]
    separator = SEPARATOR.encode()
    texts: list[bytes | None] = []
    for row in zip(*columns, strict=True):
        parts = [_value(value, max_bytes) for value in row]
        text = None if None in parts else separator.join(filter(None, parts))
        texts.append(text if text is not None and len(text) <= max_bytes else None)
    return texts


def _domains(name: str, values) -> list[str | None]:
    """Converts a column of text or numbers to strings, with lone surrogates for invalid UTF-8 as in CSV."""
    import pyarrow

    try:
        if not (pyarrow.types.is_binary(values.type) or pyarrow.types.is_large_binary(values.type)):
            values = values.cast(pyarrow.string())
    except pyarrow.ArrowNotImplementedError as error:
        raise UserError(f"--domain_key={name}: the column is not text ({error}); choose another") from error
    domains = _as_bytes(name, values).to_pylist()
    return [None if domain is None else domain.decode("utf-8", "surrogateescape") for domain in domains]


def _label(texts: list[bytes | None], domains: list[str | None]) -> list[Labeled | None]:
    """Adds the domain of each row to its text."""
    return [None if text is None else Labeled(text, name) for text, name in zip(texts, domains, strict=True)]


def _value(value, max_bytes: int) -> bytes | None:
    """Converts an Arrow value to bytes, without copying values that are too long."""
    if not value.is_valid:
        return b""
    return value.as_py() if len(value.as_buffer()) <= max_bytes else None


def _parquet_batches(file: str | BinaryIO, text_key: str, name: str, domain_key: str):
    from pyarrow import parquet

    with parquet.ParquetFile(file) as reader:
        select = _selection(name, text_key, domain_key, reader.schema_arrow)
        rows = max(1, reader.metadata.num_rows)
        for batch in reader.iter_batches(batch_size=_BATCH_ROWS, columns=select.columns):
            yield *select(batch), batch.num_rows / rows


def _arrow_batches(file: str | BinaryIO, text_key: str, name: str, domain_key: str):
    import pyarrow

    is_path = isinstance(file, str)
    with pyarrow.memory_map(file) if is_path else pyarrow.PythonFile(file, "r") as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        with pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source) as reader:
            select = _selection(name, text_key, domain_key, reader.schema)
            if is_file:
                for index in range(reader.num_record_batches):
                    yield *select(reader.get_batch(index)), 1 / reader.num_record_batches
                return
            position, size = 0, source.size()
            for batch in reader:
                yield *select(batch), (source.tell() - position) / size
                position = source.tell()


class _Selection(NamedTuple):
    """Selects the columns of the text and of the domain from a batch.

    Attributes:
      paths: name of each text column, and the keys that lead to it through structs.
      domain: the keys that lead to the domain column; None without one.
    """

    paths: dict[str, list[str]]
    domain: list[str] | None

    @property
    def columns(self) -> list[str]:
        """Names of the columns to read."""
        return list(dict.fromkeys([*self.paths, *([".".join(self.domain)] if self.domain else [])]))

    def __call__(self, batch) -> tuple[list, Any]:
        """Returns the text columns with their names, and the domain column or None."""
        texts = [(column, _select(batch, keys)) for column, keys in self.paths.items()]
        return texts, _select(batch, self.domain) if self.domain else None


def _selection(path: str, text_key: str, domain_key: str, schema) -> _Selection:
    texts = _column_paths(path, names_of(text_key, schema.names), schema, "--text_key")
    domains = _column_paths(path, [domain_key] if domain_key else [], schema, "--domain_key")
    return _Selection(texts, domains.get(domain_key))


def _column_paths(path: str, names: Sequence[str], schema, flag: str) -> dict[str, list[str]]:
    """Returns each name with the keys that lead to the column through structs."""
    import pyarrow

    paths = {}
    for name in names:
        keys = [name] if name in schema.names else name.split(".")
        fields = list(schema)
        for key in keys:
            field = next((field for field in fields if field.name == key), None)
            if field is None:
                existing = listed(map(repr, _field_names(schema)))
                raise UserError(f"{path} has no column {name!r}; set {flag} to one of {existing}")
            if sum(other.name == key for other in fields) > 1:
                raise UserError(f"{path} has several columns {name!r}; rename all but one of them")
            fields = list(field.type.fields) if pyarrow.types.is_struct(field.type) else []
        paths[name] = keys
    return paths


def _field_names(schema) -> Iterator[str]:
    import pyarrow

    for field in schema:
        if pyarrow.types.is_struct(field.type):
            yield from (f"{field.name}.{inner.name}" for inner in field.type.fields)
        else:
            yield field.name


def _select(batch, keys: list[str]):
    """Returns a column, or a field of a column of structs, which is null where a struct is null."""
    from pyarrow import compute

    values = batch.column(batch.schema.names.index(keys[0]))
    return compute.struct_field(values, keys[1:]) if len(keys) > 1 else values
