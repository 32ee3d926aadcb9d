"""Text columns of .parquet and .arrow files, read in batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dualsm.process.errors import UserError

_BATCH_ROWS = 256  # rows per batch of a .parquet file


def read_column(path: str, column: str, max_bytes: int) -> Iterator[tuple[list[bytes | None], int]]:
    """Yields batches of the values of a text column, and the bytes of the file that each batch represents.

    Values are UTF-8; null values are b"", and values longer than `max_bytes` are None.

    Args:
      path: a .parquet file, or an .arrow file in the stream format (written by `datasets`) or the file format
        (Feather 2).
      column: name of the column.
      max_bytes: maximum size of a value.

    Raises:
      UserError: if pyarrow is not installed, or if the file is damaged or has no such text column.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f"reading {path} needs pyarrow: pip install 'dualsm[parquet]'") from error
    batches = _parquet_batches if path.endswith(".parquet") else _arrow_batches
    size = remaining = Path(path).stat().st_size
    try:
        for values, fraction in batches(path, column):
            consumed = min(remaining, round(size * fraction))
            remaining -= consumed
            yield [_value(value, max_bytes) for value in _as_bytes(values)], consumed
    except pyarrow.ArrowNotImplementedError as error:
        raise UserError(f"{path}: the column {column!r} is not text ({error}); set --text_key") from error
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _as_bytes(values):
    """Casts values to binary, and checks their offsets, which may be out of bounds in a damaged file."""
    import pyarrow

    # The view as binary comes first: validating strings would reject all values if one is not UTF-8.
    views = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    values = values.view(views.get(values.type, values.type))
    values.validate(full=True)
    return values.cast(pyarrow.large_binary())


def _value(value, max_bytes: int) -> bytes | None:
    """Converts an Arrow value to bytes, without copying values that are too long."""
    if not value.is_valid:
        return b""
    return value.as_py() if len(value.as_buffer()) <= max_bytes else None


def _parquet_batches(path: str, column: str):
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        _check_column(path, column, file.schema_arrow.names)
        rows = max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[column]):
            yield batch.column(0), batch.num_rows / rows


def _arrow_batches(path: str, column: str):
    import pyarrow

    with pyarrow.memory_map(path) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        with pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source) as reader:
            _check_column(path, column, reader.schema.names)
            if is_file:
                for index in range(reader.num_record_batches):
                    yield reader.get_batch(index).column(column), 1 / reader.num_record_batches
                return
            position = 0
            for batch in reader:
                yield batch.column(column), (source.tell() - position) / source.size()
                position = source.tell()


def _check_column(path: str, column: str, names: list[str]) -> None:
    if column not in names:
        raise UserError(f"{path} has no column {column!r}; set --text_key to one of {', '.join(names)}")
