"""A stand-in for the Hugging Face hub that serves one folder as a model."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import threading
from collections.abc import Iterator
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _handler(folder: pathlib.Path, model: str, asked: list[str]) -> type:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(head=True)

        def do_GET(self) -> None:
            self._answer(head=False)

        def _answer(self, head: bool) -> None:
            asked.append(self.path)
            if self.path.startswith(f"/api/models/{model}/revision/"):
                names = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
                content = {"id": model, "sha": COMMIT, "siblings": names}
                self._send(200, json.dumps(content).encode(), head)
                return
            if re.match(rf"/api/models/{model}/tree/\w+\?", self.path):
                files = [
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": COMMIT}
                    for p in sorted(folder.iterdir())
                ]
                self._send(200, json.dumps(files).encode(), head)
                return
            file = folder / self.path.rpartition("/")[2]
            if self.path.startswith(f"/{model}/resolve/") and file.is_file():
                self._send(200, file.read_bytes(), head)
            else:
                self._send(404, b"", head, {"X-Error-Code": "EntryNotFound"})

        def _send(self, code: int, body: bytes, head: bool, more: dict[str, str] | None = None):
            self.send_response(code)
            headers = {
                "Content-Length": str(len(body)),
                "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
            }
            for name, value in (headers | (more or {})).items():
                self.send_header(name, value)
            self.end_headers()
            if not head:
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing."""

    return Handler


@contextlib.contextmanager
def hub(folder: pathlib.Path, model: str) -> Iterator[tuple[str, list[str]]]:
    """Serve the files of a folder as the model of that id.

    Yields:
        The address, for HF_ENDPOINT, and the paths that were asked for.
    """
    asked: list[str] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(folder, model, asked))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
