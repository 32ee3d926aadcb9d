"""Weights are downloaded from a server with the file API of the Hugging Face Hub."""

import hashlib
import http.server
import json
import threading
import urllib.parse
from pathlib import Path

import pytest

from dualsm.exchange.hub import list_branches, local_path
from dualsm.process.errors import UserError
from dualsm.rundir.trained_run import open_run
from tests.conftest import run_command
from tests.exchange.conftest import read_all
from tests.exchange.test_weight_files import write_shards
from tests.test_commands import assert_one_line

constants = pytest.importorskip("huggingface_hub.constants", reason="needs the extra hub")

REPOSITORY, BRANCH, COMMIT = "ltg/dual-lm-470m", "alpha_0.750_n-reps=32", "c" * 40
BRANCHES = ["main", BRANCH]
WEIGHTS = f"hf://{REPOSITORY}@{BRANCH}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers requests for the metadata and the files of one branch."""

    def do_GET(self, body: bool = True):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        if path == f"/api/models/{REPOSITORY}/refs":
            refs = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": COMMIT} for name in BRANCHES]
            content = json.dumps({"branches": refs, "tags": [], "converts": []}).encode()
            self.answer(200, content, {"Content-Type": "application/json"}, body)
            return
        if path in [f"/api/models/{REPOSITORY}/revision/{branch}" for branch in BRANCHES]:
            siblings = [{"rfilename": str(p.relative_to(self.server.folder))} for p in self.server.files()]
            content = json.dumps({"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}).encode()
            self.answer(200, content, {"Content-Type": "application/json"}, body)
            return
        prefix = f"/{REPOSITORY}/resolve/{BRANCH}/"
        file = self.server.folder / path.removeprefix(prefix)
        if path.startswith(prefix) and file.is_file():
            content = file.read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self.server.downloads += [file.name] * body
            self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)
            return
        known = path.startswith(f"/api/models/{REPOSITORY}/")
        self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"}, body)

    def do_HEAD(self):
        self.do_GET(body=False)

    def answer(self, status: int, content: bytes, headers: dict, body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Serves the files of a folder."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.downloads = folder, []

    def files(self) -> list[Path]:
        return [path for path in self.folder.rglob("*") if path.is_file()]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    with Server(tmp_path / "served") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def cache(server, tmp_path, monkeypatch):
    """Makes this process use the server and an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_branch_is_imported_as_a_run(server, released_alone, tmp_path):
    """Downloads only the required files, and only once; a second import needs no network."""
    tensors = read_all(released_alone / "model.safetensors")
    write_shards(server.folder, tensors)
    for name in ("tokenizer.json", "config.json"):
        (server.folder / name).write_bytes((released_alone / name).read_bytes())
    (server.folder / "optimizer.bin").write_bytes(b"large")
    (server.folder / "state_dict.bin").write_bytes(b"large")
    settings = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    command = ["dualsm.convert", "import", "--format=reference", f"--weights={WEIGHTS}"]
    process = run_command(*command, f"--workdir={tmp_path / 'run'}", env=settings)
    assert process.returncode == 0, process.stderr
    assert open_run(tmp_path / "run").config.model.num_layers == 2
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= set(server.downloads)
    assert not {"optimizer.bin", "state_dict.bin"} & set(server.downloads)
    assert len(server.downloads) == 3 + len(tensors)
    server.shutdown()
    server.server_close()
    process = run_command(*command, f"--workdir={tmp_path / 'again'}", env=settings)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (f"hf://{REPOSITORY}@alpha_0.5", "has no branch alpha_0.5"),
        ("hf://ltg/another", "no public repository ltg/another"),
        (WEIGHTS, "contains none of model.safetensors"),
        ("hf://ltg", "must have the form hf://OWNER/NAME"),
        ("hf://ltg/dual.git", "is not a valid repository name"),
    ],
)
def test_weights_that_do_not_exist_are_rejected(cache, weights, message):
    with pytest.raises(UserError, match=message), local_path(weights):
        pass


def test_branches_are_listed(cache, server):
    assert list_branches(f"hf://{REPOSITORY}", "--models") == sorted(BRANCHES)
    with pytest.raises(UserError, match="--models=hf://ltg/another: no public repository"):
        list_branches("hf://ltg/another", "--models")


def test_missing_network_is_one_line(tmp_path):
    settings = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    process = run_command(
        "dualsm.convert", "import", "--format=reference", f"--weights={WEIGHTS}",
        f"--workdir={tmp_path / 'run'}", env=settings,
    )  # fmt: skip
    assert_one_line(process, "cannot reach the Hugging Face Hub")
    assert not (tmp_path / "run").exists()


def test_paths_are_not_downloaded():
    with local_path("folder/model.safetensors") as path:
        assert path == Path("folder/model.safetensors")
