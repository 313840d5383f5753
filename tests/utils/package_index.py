"""A package index on this machine that can break connections, and wheels for it."""

import base64
import hashlib
import http.server
import os
import pathlib
import threading
import time
import zipfile

from benchmarks.downloads import Archive


class PackageIndex(http.server.ThreadingHTTPServer):
    """Serves `files` by name, with a page for every project.

    Attributes:
        cut: bytes after which a response breaks off; None sends it whole.
        stall: keep a response that `cut` stopped open instead of closing the connection.
        ranges: answer requests for a part of a file; else the whole file is sent.
        asked: (file, value of the header Range or None) of every request for a file.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.cut: int | None = None
        self.stall = False
        self.ranges = True
        self.asked: list[tuple[str, str | None]] = []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/simple"

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables with which pip uses this index and nothing else."""
        return {
            "PIP_INDEX_URL": self.url,
            "PIP_EXTRA_INDEX_URL": "",
            "PIP_FIND_LINKS": "",
            "PIP_CONFIG_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
        }

    def add(self, archive: Archive, content: bytes) -> None:
        self.files[archive.file] = content


class _Handler(http.server.BaseHTTPRequestHandler):
    server: PackageIndex

    def do_GET(self) -> None:
        name = self.path.rstrip("/").rpartition("/")[2]
        if name in self.server.files:
            self._send_file(name, self.server.files[name])
        elif self.path.startswith("/simple/"):
            files = [f for f in self.server.files if f.replace("_", "-").startswith(f"{name}-")]
            links = [f'<a href="../../files/{file}#sha256=0&amp;x">{file}</a>' for file in files]
            self._send(200 if files else 404, "\n".join(links).encode(), {})
        else:
            self._send(404, b"", {})

    def _send_file(self, name: str, content: bytes) -> None:
        asked = self.headers["Range"]
        self.server.asked.append((name, asked))
        if asked and self.server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            place = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self._send(206, content[start:], {"Content-Range": place}, self.server.cut)
        else:
            self._send(200, content, {}, self.server.cut)

    def _send(
        self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])
        self.wfile.flush()
        if self.server.stall and cut is not None:
            time.sleep(60)

    def log_message(self, *arguments: object) -> None:
        pass


def write_wheel(path: pathlib.Path, files: dict[str, bytes]) -> Archive:
    """Write a wheel NAME-VERSION-py3-none-any.whl that pip accepts; return its description."""
    name, version = path.name.split("-")[:2]
    information = f"{name}-{version}.dist-info"
    contents = files | {
        f"{information}/METADATA": (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nAbout {name}.\n".encode()
        ),
        f"{information}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{information}/LICENSE": b"do as you like",
    }
    record = "".join(
        f"{file},sha256={base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode()},\n"
        for file, content in contents.items()
    )
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in contents.items():
            archive.writestr(file, content)
        archive.writestr(f"{information}/RECORD", record)
    return Archive(
        requirement=f"{name.replace('_', '-')}=={version}",
        file=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        size=path.stat().st_size,
    )
