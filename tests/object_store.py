"""Google Cloud Storage on this machine: an emulator behind a proxy that can make requests fail.

The emulator (gcp-storage-emulator) ignores conditions on generations, and does not send the generation of the
content that it returns. The proxy adds both as the documentation of the JSON API describes them.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import logging
import random
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator

from tests.processes import free_port

BUCKET = "bucket"
FAULTS = ("unavailable", "dropped before", "dropped after", "condition refused", "timeout")
_HELD_SECONDS = 1.0  # of a request that times out
_HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}


class ObjectStore:
    """A running store.

    Attributes:
      fault_rate: share of the requests that fail.
      faults: number of failed requests by kind.
      requests: number of all requests.
      names: number of requests by the name of the object.
      swallows: called with the method and the body of each request; if it returns True, the request has no
        effect and no answer.
    """

    def __init__(self, emulator_port: int, seed: int = 0):
        self.port, self.fault_rate = free_port(), 0.0
        self.faults, self.names, self.requests = Counter(), Counter(), 0
        self.swallows: Callable[[str, bytes], bool] = lambda method, body: False
        self._emulator_port, self._random, self.lock = emulator_port, random.Random(seed), threading.Lock()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that direct gcsfs, tensorstore, ArrayRecord and tensorboardX to the store."""
        address = f"http://127.0.0.1:{self.port}"
        return {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would wait for a gRPC service
        }

    def choose_fault(self, query: dict) -> str | None:
        """Returns the fault of a request, or None."""
        with self.lock:
            self.requests += 1
            if self._random.random() >= self.fault_rate:
                return None
            kinds = [kind for kind in FAULTS if kind != "condition refused" or "ifGenerationMatch" in query]
            fault = self._random.choice(kinds)
            self.faults[fault] += 1
            return fault

    def ask(self, method: str, path: str, headers: dict, body: bytes):
        """Sends a request to the emulator; returns status, headers and body of its answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self._emulator_port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body or None, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def generation(self, bucket: str, name: str) -> str:
        """Returns the generation of an object; "0" if it does not exist."""
        path = f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}"
        status, _, body = self.ask("GET", path, {}, b"")
        return json.loads(body)["generation"] if status == 200 else "0"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: ObjectStore

    def _handle(self) -> None:
        body = self._read_body()
        if self.store.swallows(self.command, body):
            return self._drop()
        url = urllib.parse.urlparse(self.path)
        query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
        fault = self.store.choose_fault(query)
        if fault == "unavailable":
            return self._answer(503, [], b"try again")
        if fault == "condition refused":
            return self._answer(412, [], b'{"error": {"code": 412, "message": "conditionNotMet"}}')
        if fault == "timeout":
            time.sleep(_HELD_SECONDS)
        if fault in ("timeout", "dropped before"):
            return self._drop()
        answer = self._forward(url.path, query, body)
        return self._drop() if fault == "dropped after" else self._answer(*answer)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _handle

    def _forward(self, path: str, query: dict, body: bytes):
        headers = {key: value for key, value in self.headers.items() if key.lower() != "transfer-encoding"}
        bucket, name = _object(path, query)
        with self.store.lock:
            self.store.names[name] += 1
            generation = self.store.generation(bucket, name) if name else "0"
            if query.get("ifGenerationMatch", generation) != generation:
                return 412, [], b'{"error": {"code": 412, "message": "conditionNotMet"}}'
            if query.get("ifGenerationNotMatch") == generation != "0":
                return 304, [], b""
            status, answer_headers, content = self.store.ask(self.command, self.path, headers, body)
        if self.command == "GET" and status in (200, 206) and name:
            answer_headers.append(("x-goog-generation", generation))
        return status, answer_headers, content

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            content = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, headers: list, body: bytes) -> None:
        with contextlib.suppress(OSError):  # the client may have been killed
            self.send_response(status)
            for key, value in headers:
                if key.lower() not in _HOP_HEADERS:
                    self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def _drop(self) -> None:
        self.close_connection = True

    def log_message(self, *args) -> None:
        pass


def _object(path: str, query: dict) -> tuple[str, str]:
    """Returns the bucket and the name of the object that a request is about; the name may be empty."""
    _, _, rest = path.partition("/b/")
    bucket, _, rest = rest.partition("/o")
    name = urllib.parse.unquote(rest.removeprefix("/")) or query.get("name", "")
    return bucket, name


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128

    def handle_error(self, *args) -> None:
        pass  # clients are killed in the tests


@contextlib.contextmanager
def object_store(seed: int = 0) -> Iterator[ObjectStore]:
    """Runs a store with an empty bucket `BUCKET` inside the context."""
    from gcp_storage_emulator.server import create_server

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)

    port = free_port()
    emulator = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    emulator.start()
    store = ObjectStore(port, seed)
    proxy = _Server(("127.0.0.1", store.port), type("Handler", (_Handler,), {"store": store}))
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
        emulator.stop()
