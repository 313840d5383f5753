"""A stand-in for the upload interface of the Hugging Face hub, which keeps what it receives."""

import base64
import contextlib
import dataclasses
import http.server
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

TOKEN = "hf_secret"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Uploads:
    """What the hub holds.

    Attributes:
        repositories: id → whether it is private.
        files: (repository, branch) → path → content.
        large: content of files of Git LFS by their SHA-256.
        readable_only: repositories to which the token may not write.
    """

    address: str = ""
    repositories: dict[str, bool] = dataclasses.field(default_factory=dict)
    files: dict[tuple[str, str], dict[str, bytes]] = dataclasses.field(default_factory=dict)
    large: dict[str, bytes] = dataclasses.field(default_factory=dict)
    readable_only: set[str] = dataclasses.field(default_factory=set)


def _handler(uploads: Uploads) -> type:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._body()
            if not self._allowed():
                return
            if self.path == "/api/whoami-v2":
                self._send(200, {"type": "user", "name": "me", "orgs": []})
            else:
                self._send(404, {"error": "unknown"})

        do_HEAD = do_GET

        def do_PUT(self) -> None:
            uploads.large[self.path.rpartition("/")[2]] = self._body()
            self._send(200, {})

        def do_POST(self) -> None:
            body = self._body()
            if not self._allowed():
                return
            if self.path == "/api/repos/create":
                self._create(json.loads(body))
            elif self.path == "/api/validate-yaml":
                self._send(200, {"errors": [], "warnings": []})
            elif found := re.match(r"/api/models/([^/]+/[^/]+)/branch/(\w+)", self.path):
                uploads.files.setdefault((found[1], found[2]), {})
                self._send(200, {})
            elif re.match(r"/api/models/[^/]+/[^/]+/preupload/", self.path):
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = {True: "lfs", False: "regular"}
                answer = [
                    {
                        "path": name,
                        "uploadMode": modes[name.endswith(".safetensors")],
                        "shouldIgnore": False,
                    }
                    for name in names
                ]
                self._send(200, {"files": answer})
            elif self.path.endswith("/info/lfs/objects/batch"):
                self._large(json.loads(body)["objects"])
            elif found := re.match(r"/api/models/([^/]+/[^/]+)/commit/(\w+)", self.path):
                self._commit(found[1], found[2], body)
            else:
                self._send(404, {"error": "unknown"})

        def _create(self, wanted: dict) -> None:
            name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
            if name in uploads.readable_only:
                self._send(403, {"error": "Forbidden"})
                return
            known = name in uploads.repositories
            private = wanted.get("private") or wanted.get("visibility") == "private"
            uploads.repositories.setdefault(name, bool(private))
            address = {"url": f"{uploads.address}/{name}"}
            self._send(409 if known else 200, address | ({"error": "exists"} if known else {}))

        def _large(self, objects: list[dict]) -> None:
            answer = [
                part | {"actions": {"upload": {"href": f"{uploads.address}/large/{part['oid']}"}}}
                for part in objects
            ]
            self._send(200, {"transfer": "basic", "objects": answer})

        def _commit(self, repository: str, branch: str, body: bytes) -> None:
            files = uploads.files.setdefault((repository, branch), {})
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = uploads.large[value["oid"]]
            address = f"{uploads.address}/{repository}/commit/{COMMIT}"
            self._send(200, {"commitOid": COMMIT, "commitUrl": address, "pullRequestUrl": None})

        def _allowed(self) -> bool:
            if self.headers.get("authorization") == f"Bearer {TOKEN}":
                return True
            self._send(401, {"error": "Invalid username or password."})
            return False

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                content = b""
                while size := int(self.rfile.readline(), 16):
                    content += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return content
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _send(self, code: int, content: dict) -> None:
            body = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Print nothing."""

    return Handler


@contextlib.contextmanager
def upload_hub() -> Iterator[Uploads]:
    """Serve an empty hub to which the user `me` may upload with TOKEN."""
    uploads = Uploads()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(uploads))
    uploads.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield uploads
    finally:
        server.shutdown()
        server.server_close()
