"""A column of text out of .parquet and .arrow files, a batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dualsm.process.errors import UserError

_ROWS = 256  # read at once from parquet


def read_column(path: str, column: str, max_bytes: int) -> Iterator[tuple[list[bytes | None], int]]:
    """Values of a column as UTF-8, b"" for missing ones, and the bytes of the file each batch accounts for.

    Args:
      path: .parquet; or .arrow, a stream (as the library `datasets` saves) or a file (Feather 2).
      column: of strings.
      max_bytes: in place of longer values stands None.

    Raises:
      UserError: when pyarrow is not installed, the file is damaged or has no such column.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(f"reading {path} needs pyarrow: pip install 'dualsm[parquet]'") from error
    batches = _parquet_batches if path.endswith(".parquet") else _arrow_batches
    size, left = Path(path).stat().st_size, Path(path).stat().st_size
    try:
        for values, share in batches(path, column):
            consumed = min(left, round(size * share))
            left -= consumed
            yield [_value(value, max_bytes) for value in _as_bytes(values)], consumed
    except pyarrow.ArrowNotImplementedError as error:
        reason = f"the column {column!r} is not text ({error}); see --text_key"
        raise UserError(f"cannot read {path}: {reason}") from error
    except pyarrow.ArrowException as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _as_bytes(values):
    """Values as binary, their offsets checked: those of a damaged file may point anywhere in memory."""
    import pyarrow

    # As binary before the check, since that would refuse all for one text that is no UTF-8.
    views = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    values = values.view(views.get(values.type, values.type))
    values.validate(full=True)
    return values.cast(pyarrow.large_binary())


def _value(value, max_bytes: int) -> bytes | None:
    """A value of Arrow's as bytes of Python's; one that is too long is not copied out of its batch."""
    if not value.is_valid:
        return b""
    return value.as_py() if len(value.as_buffer()) <= max_bytes else None


def _parquet_batches(path: str, column: str):
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        _check_column(path, column, file.schema_arrow.names)
        rows = max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
            yield batch.column(0), batch.num_rows / rows


def _arrow_batches(path: str, column: str):
    import pyarrow

    with pyarrow.memory_map(path) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        with pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source) as reader:
            _check_column(path, column, reader.schema.names)
            if is_file:
                for number in range(reader.num_record_batches):
                    yield reader.get_batch(number).column(column), 1 / reader.num_record_batches
                return
            position = 0
            for batch in reader:
                yield batch.column(column), (source.tell() - position) / source.size()
                position = source.tell()


def _check_column(path: str, column: str, names: list[str]) -> None:
    if column not in names:
        raise UserError(f"{path} has no column {column!r} (it has {', '.join(names)}); see --text_key")
