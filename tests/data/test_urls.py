"""Inputs at URLs: the same documents as from local files, and errors in one line."""

import gzip
import http.server
import importlib
import json
import pathlib
import random
import threading
import urllib.parse

import pytest

from dualsm.data import inputs, readers
from dualsm.data.build import Recipe, build
from dualsm.process import paths, urls
from dualsm.process.errors import BucketError, UserError, exit_status, user_message
from tests.data.reading import TEXTS, read
from tests.data.test_build import write_lines

fsspec = pytest.importorskip("fsspec")
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
FILES = {
    "a.jsonl": LINES,
    "sub/b.jsonl.gz": gzip.compress(LINES),
    "sub/c.csv": b"text,n\none,1\ntwo,2\n",
    "sub/d.txt": b"a document",
    "README.md": b"text",
    ".hidden/e.jsonl": LINES,
}


@pytest.fixture
def local(tmp_path):
    """Returns a folder with the files."""
    folder = tmp_path / "local"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return folder
    parquet.write_table(pyarrow.table({"text": TEXTS}), folder / "sub" / "f.parquet")
    return folder


@pytest.fixture
def memory(local):
    """Returns the URL of a copy of the folder in memory."""
    system = fsspec.filesystem("memory")
    system.put(f"{local}/", "/data/", recursive=True)
    yield "memory://data"
    system.rm("/data", recursive=True)


def test_files_folders_and_globs_give_the_documents_of_local_files(local, memory, capsys):
    for part in (
        "",
        "/a.jsonl",
        "/*.jsonl",
        "/**/*.csv",
        "/sub",
        "/sub/*",
        "/[as]*",
        "/s?b",
        "/?.jsonl",
        "/a.jsonl,{}/sub/c.csv",
    ):
        url, path = (f"{root}{part}".replace("{}", str(root)) for root in (memory, local))
        assert read(url) == read(path) != []
        names = [urls.file_name(found) for found in inputs.find_inputs(url)]
        assert names == [urls.file_name(found) for found in inputs.find_inputs(path)]
    assert read(f"{local}/a.jsonl,{memory}/sub/c.csv") == [*TEXTS, "one", "two"]
    inputs.find_inputs(memory, quiet=False)
    assert "ignored files with other suffixes (1), such as README.md" in capsys.readouterr().out
    with pytest.raises(UserError, match="--input: no files match 'memory://data/.*none"):
        inputs.find_inputs(f"{memory}/*.none")
    with pytest.raises(UserError, match="no files match 'memory://data/none.jsonl'"):
        inputs.find_inputs(f"{memory}/none.jsonl")


def test_a_corpus_does_not_depend_on_where_its_text_is(tmp_path, documents, memory):
    path = write_lines(tmp_path / "x.jsonl", documents[:100])
    fsspec.filesystem("memory").put(path, "/data/x.jsonl")
    made = [
        build(Recipe(source, vocab_size=384, valid_fraction=0.2), str(tmp_path / name), workers, quiet=True)
        for name, source, workers in (("one", path, 1), ("two", f"{memory}/x.jsonl", 2))
    ]
    keys = ("identity", "inputs_sha256", "documents_read")
    assert [made[0][key] for key in keys] == [made[1][key] for key in keys]


def test_a_saved_dataset_at_a_url_is_read_like_a_local_one(memory):
    system = fsspec.filesystem("memory")
    state = {"_data_files": [{"filename": name} for name in ("z.jsonl", "a.jsonl")]}
    for name, value in (("z", "last"), ("a", "first"), ("other", "no")):
        system.pipe(f"/data/saved/train/{name}.jsonl", json.dumps({"text": value}).encode())
    system.pipe("/data/saved/train/state.json", json.dumps(state).encode())
    assert read(f"{memory}/saved/train") == ["last", "first"]
    system.pipe("/data/saved/dataset_dict.json", b"{}")
    with pytest.raises(UserError, match="data/saved contains several splits; .* such as memory://.*/train"):
        inputs.find_inputs(f"{memory}/saved")
    system.pipe("/data/saved/train/state.json", b"{}")
    with pytest.raises(UserError, match="memory://.*/state.json is damaged"):
        inputs.find_inputs(f"{memory}/saved/train")


class Flaky:
    """An open file that fails in every second read, and in some of them after a part of the data."""

    def __init__(self, file, failures):
        self._file, self._failures = file, failures

    def read(self, size):
        self._failures.append(len(self._failures) % 2 == 0)
        if self._failures[-1]:
            self._file.read(7)
            raise ConnectionError("the connection was reset")
        return self._file.read(min(size, 50_000))

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_reading_continues_after_a_lost_connection(memory, monkeypatch):
    content = b"".join(b'{"text": "%d"}\n' % i for i in range(20_000))
    system = fsspec.filesystem("memory")
    system.pipe("/data/long.jsonl", content)
    opened, failures, real = [], [], type(system).open

    def open_flaky(self, path, mode):
        opened.append(path)
        return Flaky(real(self, path, mode), failures)

    monkeypatch.setattr(type(system), "open", open_flaky)
    monkeypatch.setattr(paths.time, "sleep", lambda seconds: None)
    assert read(f"{memory}/long.jsonl") == [str(i) for i in range(20_000)]
    assert sum(failures) > 5 and len(opened) > sum(failures)
    monkeypatch.setattr(Flaky, "read", lambda self, size: 1 / 0)
    with pytest.raises(BucketError) as caught:
        read(f"{memory}/long.jsonl")
    assert exit_status(caught.value) == 1 and "division by zero" in user_message(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/*.jsonl", r"a package for s3:// is not installed; run pip install 'dualsm\[s3\]'"),
        ("hf://datasets/a/b", r"a package for hf:// is not installed; run pip install 'dualsm\[hub\]'"),
        ("https://host/a.jsonl", r"run pip install 'dualsm\[http\]'"),
        ("abfs://bucket/a.jsonl", "a package for abfs:// is not installed; Install adlfs"),
        ("nothing://a.jsonl", "Protocol not known: nothing; use a protocol that fsspec supports"),
    ],
)
def test_a_missing_package_is_one_line(url, message, monkeypatch):
    registry = importlib.import_module("fsspec.registry")

    def fail(name, *args):
        raise ImportError(name)

    monkeypatch.setattr(registry, "registry", {})
    monkeypatch.setattr(registry, "_import_class", fail)
    with pytest.raises(UserError, match=message):
        inputs.find_inputs(url)


def test_outputs_cannot_be_urls(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", ["a", "b"])
    with pytest.raises(UserError, match="s3://bucket/out: only Google Cloud Storage is supported"):
        build(Recipe(path, vocab_size=384), "s3://bucket/out", 1, quiet=True)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves a folder over HTTP, and as a dataset repository with the API of the Hugging Face Hub."""

    protocol_version = "HTTP/1.1"

    def do_GET(self, body: bool = True):
        self.server.requested.append(self.path)
        parsed = urllib.parse.urlparse(self.path)
        path, folder = urllib.parse.unquote(parsed.path), self.server.folder
        api = f"/api/datasets/{REPOSITORY}"
        if path in (api, f"{api}/revision/main"):
            self.answer({"id": REPOSITORY, "sha": "c" * 40, "siblings": [], "tags": []}, body)
        elif path.startswith(f"{api}/tree/main"):
            below = folder / path.removeprefix(f"{api}/tree/main").strip("/")
            found = below.rglob("*") if "recursive=true" in parsed.query.lower() else below.iterdir()
            self.answer([self.entry(p) for p in sorted(found)] if below.is_dir() else None, body)
        else:
            name = path.removeprefix(f"/datasets/{REPOSITORY}/resolve/main").lstrip("/")
            self.send_file(folder / name, body)

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_POST(self):
        form = self.rfile.read(int(self.headers["Content-Length"])).decode()
        wanted = json.loads(form)["paths"] if form.startswith("{") else urllib.parse.parse_qs(form)["paths"]
        entries = [self.server.folder / name for name in wanted]
        self.answer([self.entry(path) for path in entries if path.exists()], True)

    def entry(self, path) -> dict:
        kind = "directory" if path.is_dir() else "file"
        name = str(path.relative_to(self.server.folder))
        return {"type": kind, "path": name, "size": path.stat().st_size, "oid": "0" * 40}

    def answer(self, value, body: bool) -> None:
        content = json.dumps({} if value is None else value).encode()
        headers = {"Content-Type": "application/json"}
        if value is None:
            headers["X-Error-Code"] = "EntryNotFound"
        self.send(404 if value is None else 200, content, headers, body)

    def send_file(self, path, body: bool) -> None:
        if not path.is_file():
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            return
        content, status, headers = path.read_bytes(), 200, {"ETag": '"1"', "X-Repo-Commit": "c" * 40}
        if self.server.accepts:
            headers["Accept-Ranges"] = self.server.accepts
        if self.server.ranges:
            headers["Accept-Ranges"] = "bytes"
            if requested := self.headers.get("Range", "").removeprefix("bytes="):
                first, _, last = requested.partition("-")
                end = min(len(content), int(last) + 1 if last else len(content))
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
                content, status = content[int(first) : end], 206
        self.send(status, content, headers, body)

    def send(self, status: int, content: bytes, headers: dict, body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body and self.server.cuts and len(content) > self.server.cuts[-1]:
            content = content[: self.server.cuts.pop()]  # a lost connection
            self.close_connection = True
        if body:
            self.wfile.write(content)
            self.server.sent += len(content)

    def log_message(self, *_):
        pass


REPOSITORY = "owner/name"


@pytest.fixture
def server(local):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.folder, made.ranges, made.daemon_threads = local, True, True
        made.accepts, made.cuts, made.requested, made.sent = None, [], [], 0
        made.address = f"http://127.0.0.1:{made.server_port}"
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


@pytest.mark.parametrize("ranges", [True, False])
def test_files_are_read_over_http(server, local, ranges):
    pytest.importorskip("aiohttp", reason="aiohttp is not installed (extra http)")
    server.ranges = ranges
    for name in ("a.jsonl", "sub/b.jsonl.gz", "sub/c.csv", "sub/f.parquet"):
        if (local / name).exists():
            assert read(f"{server.address}/{name}") == read(local / name)
    assert read(f"{server.address}/a.jsonl?download=true&x=.gz") == TEXTS
    with pytest.raises(UserError, match="no files match 'http://127.0.0.1:.*/none.jsonl'"):
        inputs.find_inputs(f"{server.address}/none.jsonl")


@pytest.mark.parametrize("accepts", [None, "none"])
def test_long_files_are_read_from_servers_without_range_requests(server, local, accepts, monkeypatch):
    """`Accept-Ranges: none` makes fsspec stream the file, and reading continues after a lost connection."""
    pytest.importorskip("aiohttp", reason="aiohttp is not installed (extra http)")
    server.ranges, server.accepts = False, accepts
    texts = [f"{i:4}" * 1000 for i in range(2000)]
    (local / "long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    size = (local / "long.jsonl").stat().st_size
    assert size > 6 << 20
    url = f"{server.address}/long.jsonl"
    assert read(url, max_bytes=1 << 20) == texts
    monkeypatch.setattr(paths.time, "sleep", lambda seconds: None)
    server.cuts = [size - 1000, 3 << 20, 1 << 20]
    with urls.open_input(url) as file:
        assert file.read() == (local / "long.jsonl").read_bytes()
    assert server.cuts == []


def write_columns(path, table, rows):
    """Writes a Parquet or Arrow file with this number of rows per row group or batch."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra parquet)")
    from pyarrow import parquet

    table = pyarrow.table(table)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=rows)
        return
    new = pyarrow.ipc.new_stream if path.name.startswith("stream") else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


@pytest.mark.parametrize("name", ["wide.parquet", "stream.arrow", "file.arrow"])
def test_column_files_are_streamed(server, local, monkeypatch, name):
    """Nothing is copied or read twice, but for one read-ahead; of a Parquet file only the text is read."""
    pytest.importorskip("aiohttp", reason="aiohttp is not installed (extra http)")
    texts = [f"text {i}" * 20 for i in range(3000)]
    images = [random.Random(i).randbytes(8000) for i in range(3000)]
    write_columns(local / name, {"image": images, "text": texts}, 500 if name == "wide.parquet" else 100)
    size, url = (local / name).stat().st_size, f"{server.address}/{name}"
    monkeypatch.setattr(urls, "local_input", None)
    assert read(url, max_bytes=1 << 20) == read(local / name, max_bytes=1 << 20) == texts
    assert server.sent < (0.9 * size if name == "wide.parquet" else 1.05 * size + (5 << 20))
    assert len(server.requested) < 60
    (block, *_) = readers.read_blocks(url, "text", 1 << 20)
    assert block.consumed > 0


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow"])
def test_streams_of_columns_survive_lost_connections(server, local, monkeypatch, name):
    """Each connection is lost after 7 MB; the largest part of the file that pyarrow asks for is longer."""
    pytest.importorskip("aiohttp", reason="aiohttp is not installed (extra http)")
    monkeypatch.setattr(paths.time, "sleep", lambda seconds: None)
    texts = [random.Random(i).randbytes(6000).hex() for i in range(2000)]
    write_columns(local / name, {"text": texts}, len(texts))
    url = f"{server.address}/{name}"
    server.cuts = [7 << 20] * 9 + [40_000, 40_000]
    assert read(url, max_bytes=1 << 20) == texts
    assert len(server.cuts) <= 9
    server.cuts = [100] * 1000
    with pytest.raises(BucketError):
        read(url, max_bytes=1 << 20)


def test_a_server_that_stops_sending_parts_is_an_error(server, local):
    pytest.importorskip("aiohttp", reason="aiohttp is not installed (extra http)")
    write_columns(local / "stream.arrow", {"text": ["x" * 100_000] * 200}, 1)
    blocks = readers.read_blocks(f"{server.address}/stream.arrow", "text", 1 << 20)
    next(blocks)
    server.ranges = False
    with pytest.raises(BucketError):
        list(blocks)


def test_a_column_file_is_copied_once_from_a_server_without_range_requests(server, local):
    pytest.importorskip("aiohttp", reason="aiohttp is not installed (extra http)")
    write_columns(
        local / "a.parquet", {"text": [random.Random(i).randbytes(6000).hex() for i in range(2000)]}, 99
    )
    server.ranges = False
    assert read(f"{server.address}/a.parquet") == read(local / "a.parquet")
    assert server.sent < 1.5 * (local / "a.parquet").stat().st_size


def test_files_are_requested_without_compression_and_a_limit_on_the_time():
    aiohttp = pytest.importorskip("aiohttp", reason="aiohttp is not installed (extra http)")
    system, _ = urls._resolve("https://host/a.jsonl")
    assert system.kwargs["headers"] == {"Accept-Encoding": "identity"}
    timeout = system.client_kwargs["timeout"]
    assert isinstance(timeout, aiohttp.ClientTimeout) and timeout.total is None and timeout.sock_read == 60


def test_signed_urls_are_recognized_and_not_stored(server, local, tmp_path, documents):
    pytest.importorskip("aiohttp", reason="aiohttp is not installed (extra http)")
    write_lines(local / "x.jsonl", documents[:60])
    write_lines(local / "y.jsonl", documents[60:80])
    made = []
    for signature in ("one", "two"):
        urls_of = [f"{server.address}/{name}.jsonl?signature={signature}" for name in "xy"]
        recipe = Recipe(urls_of[0], valid_input=urls_of[1], vocab_size=384)
        made.append(build(recipe, str(tmp_path / "out"), 1, quiet=True))
    assert made[0] == made[1] and "signature" not in json.dumps(made[0])
    assert made[0]["arguments"]["input"] == f"{server.address}/x.jsonl"


def test_a_sibling_of_a_url_has_its_query(server, local):
    pytest.importorskip("aiohttp", reason="aiohttp is not installed (extra http)")
    (local / "a.bin").write_bytes(b"ids")
    (local / "a.idx").write_bytes(b"index")
    requested = server.requested = []
    with urls.local_input(f"{server.address}/a.bin?token=a/b", "a.idx") as path:
        files = [pathlib.Path(path).with_suffix(suffix) for suffix in (".bin", ".idx")]
        assert [file.read_bytes() for file in files] == [b"ids", b"index"]
    assert {"/a.bin?token=a/b", "/a.idx?token=a/b"} == set(requested)


def test_messages_name_urls(memory):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra parquet)")
    system = fsspec.filesystem("memory")
    for name in ("bad.parquet", "bad.arrow", "bad.bin", "bad.idx"):
        system.pipe(f"/data/{name}", b"neither of them")
    for pattern, message in {
        "sub/f.parquet": f"{memory}/sub/f.parquet has no column 'body'",
        "bad.parquet": f"cannot read {memory}/bad.parquet",
        "bad.arrow": f"cannot read {memory}/bad.arrow",
        "bad.bin": f"bad.idx, the index of {memory}/bad.bin, is damaged",
    }.items():
        with pytest.raises(UserError, match=f"^{message}"):
            read(f"{memory}/{pattern}", "body")
    (block, *_) = readers.read_blocks(f"{memory}/sub/f.parquet", "text", 1 << 20)
    assert block.location(0) == f"{memory}/sub/f.parquet, document 1"


def test_a_file_of_unknown_size_counts_as_a_gibibyte_of_text(memory, monkeypatch, capsys):
    """`input_size` is replaced, because the server of these tests states all sizes."""
    known = inputs.estimated_text_bytes([f"{memory}/a.jsonl"], quiet=False)
    assert (known, capsys.readouterr().out) == (len(LINES), "")
    monkeypatch.setattr(inputs, "input_size", lambda path: (0,) if path.startswith("http") else (5,))
    paths_of = ["http://host/a.jsonl?key=secret", "local.jsonl"]
    assert inputs.estimated_text_bytes(paths_of, quiet=False) == (1 << 30) + 5
    assert "the size of http://host/a.jsonl is unknown (files: 1)" in capsys.readouterr().out


def test_a_server_that_does_not_answer_ends_with_status_1():
    pytest.importorskip("aiohttp", reason="aiohttp is not installed (extra http)")
    with pytest.raises(BucketError) as caught:
        inputs.find_inputs("http://127.0.0.1:9/a.jsonl")
    assert exit_status(caught.value) == 1 and "check" in user_message(caught.value)


def test_files_of_the_hugging_face_hub_are_read(server, local, monkeypatch):
    pytest.importorskip("huggingface_hub", reason="needs the extra hub")
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "".join(template[1:]))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    root = f"hf://datasets/{REPOSITORY}"
    for part in ("/a.jsonl", "/*.jsonl", "/sub/*", "/sub", "/**/*.csv", ""):
        assert read(f"{root}{part}") == read(f"{local}{part}") != []
    assert read(f"{root}@main/sub/c.csv") == ["one", "two"]
    with pytest.raises(UserError, match="no files match 'hf://datasets/owner/name/none.jsonl'"):
        inputs.find_inputs(f"{root}/none.jsonl")
    with pytest.raises(UserError, match="hf://datasets: .*; check the URL"):
        inputs.find_inputs("hf://datasets")
