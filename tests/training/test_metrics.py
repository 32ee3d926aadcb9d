"""Where metrics go when nothing can be appended to a file."""

from etils import epath

from dualsm.rundir.metrics import _ObjectFile


def test_a_file_in_a_bucket_is_written_whole_now_and_then(tmp_path):
    path = epath.Path(tmp_path / "metrics.jsonl")
    file = _ObjectFile(path, "kept\n")
    file.write("new\n")
    assert not path.exists()  # too soon after the last time
    file.sync()
    assert path.read_text() == "kept\nnew\n"
    file.write("last\n")
    file.close()
    assert path.read_text() == "kept\nnew\nlast\n"
