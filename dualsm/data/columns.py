"""Text columns of .parquet and .arrow files, read in batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dualsm.data.fields import SEPARATOR, names_of
from dualsm.process.errors import UserError

_BATCH_ROWS = 256  # rows per batch of a .parquet file


def read_columns(
    path: str, text_key: str, max_bytes: int, name: str = ""
) -> Iterator[tuple[list[bytes | None], int]]:
    """Yields batches of texts, and the bytes of the file that each batch represents.

    Texts are UTF-8; null values are b"", and texts longer than `max_bytes` are None.

    Args:
      path: a .parquet file, or an .arrow file in the stream format (written by `datasets`) or the file format
        (Feather 2).
      text_key: names of columns, separated by commas, whose values are joined; `a.b` is the field `b` of the
        column of structs `a`, unless a column is named `a.b`.
      max_bytes: maximum size of a text.
      name: path for messages, if `path` is a temporary copy.

    Raises:
      UserError: if pyarrow is not installed, or if the file is damaged or has no such text column.
    """
    name = name or path
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f"reading {name} needs pyarrow: pip install 'dualsm[parquet]'") from error
    batches = _parquet_batches if path.lower().endswith(".parquet") else _arrow_batches
    size = remaining = Path(path).stat().st_size
    try:
        for columns, fraction in batches(path, text_key, name):
            consumed = min(remaining, round(size * fraction))
            remaining -= consumed
            yield _texts([_as_bytes(column, values) for column, values in columns], max_bytes), consumed
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read {name}: {error}") from error
    except _NotText as error:
        raise UserError(f"{name}: {error}") from error


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


def _value(value, max_bytes: int) -> bytes | None:
    """Converts an Arrow value to bytes, without copying values that are too long."""
    if not value.is_valid:
        return b""
    return value.as_py() if len(value.as_buffer()) <= max_bytes else None


def _parquet_batches(path: str, text_key: str, name: str):
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        paths = _column_paths(name, text_key, file.schema_arrow)
        rows = max(1, file.metadata.num_rows)
        columns = list(dict.fromkeys(paths))
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            yield [(column, _select(batch, keys)) for column, keys in paths.items()], batch.num_rows / rows


def _arrow_batches(path: str, text_key: str, name: str):
    import pyarrow

    with pyarrow.memory_map(path) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        with pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source) as reader:
            paths = _column_paths(name, text_key, reader.schema)

            def select(batch):
                return [(column, _select(batch, keys)) for column, keys in paths.items()]

            if is_file:
                for index in range(reader.num_record_batches):
                    yield select(reader.get_batch(index)), 1 / reader.num_record_batches
                return
            position = 0
            for batch in reader:
                yield select(batch), (source.tell() - position) / source.size()
                position = source.tell()


def _column_paths(path: str, text_key: str, schema) -> dict[str, list[str]]:
    """Returns the columns that a text key names, each with the keys that lead to it through structs."""
    import pyarrow

    paths = {}
    for name in names_of(text_key, schema.names):
        keys = [name] if name in schema.names else name.split(".")
        fields = list(schema)
        for key in keys:
            field = next((field for field in fields if field.name == key), None)
            if field is None:
                names = ", ".join(_field_names(schema))
                raise UserError(f"{path} has no column {name!r}; set --text_key to one of {names}")
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
