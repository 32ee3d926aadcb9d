"""The metrics file in an object store, where files cannot be appended to."""

from etils import epath

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
