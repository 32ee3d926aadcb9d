"""The metrics file in an object store, where files cannot be appended to."""

import pytest
from etils import epath

from dualsm.process import paths
from dualsm.rundir.metrics import _ObjectFile


def test_metrics_file_in_a_bucket_is_uploaded_at_intervals(tmp_path):
    path = epath.Path(tmp_path / "metrics.jsonl")
    file = _ObjectFile(path, "kept\n")
    file.write("new\n")
    assert not path.exists()  # too soon after the last upload
    file.sync()
    assert path.read_text() == "kept\nnew\n"
    file.write("last\n")
    file.close()
    assert path.read_text() == "kept\nnew\nlast\n"


def test_log_lines_do_not_wait_for_an_unreachable_bucket(tmp_path, monkeypatch):
    """`write` makes one attempt per interval, without pauses; `sync` retries."""
    attempts, pauses = [], []
    monkeypatch.setattr(paths.time, "sleep", pauses.append)

    class Unreachable:
        def write_bytes(self, content):
            attempts.append(content)
            raise RuntimeError("503")

    file = _ObjectFile(Unreachable(), "")
    file.write("a\n")
    file._last_attempt -= _ObjectFile.SECONDS + 1
    with pytest.raises(OSError, match="503"):
        file.write("b\n")
    file.write("c\n")
    assert attempts == [b"a\nb\n"] and not pauses
    with pytest.raises(OSError, match="503"):
        file.sync()
    assert attempts[-1] == b"a\nb\nc\n" and len(attempts) > 3 and len(pauses) == len(attempts) - 2
    file._path = epath.Path(tmp_path / "metrics.jsonl")
    file.close()
    assert file._path.read_text() == "a\nb\nc\n"
