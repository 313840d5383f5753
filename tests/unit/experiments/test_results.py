"""Reading finished runs from folders and tables, and which runs a report combines."""

import json
import os
import shutil
import time

import pandas as pd
import pytest
import yaml

from scaleup.errors import ConfigError
from scaleup.experiments import report, results, runs
from tests.utils.finished_runs import leave_run, read_cells


def test_results_that_a_run_has_set_aside_do_not_count(small, tmp_path):
    shutil.copytree(small / "cola-100-full-0", small / "cola-100-full-0" / "before-1")
    assert len(results.load([str(small)])) == 11
    assert (
        len(results.load([str(small / "cola-100-full-0" / "before-1")])) == 1
    )  # asked for by name


def test_runs_that_do_not_belong_together_are_refused(small, tmp_path):
    leave_run(tmp_path / "more", "cola", 100, "full", 0, 0.5)
    with pytest.raises(ConfigError, match=r"are the same trial \(100, full, cola, 0\)"):
        report.report("table1", [str(small), str(tmp_path / "more")], tmp_path / "out")
    leave_run(tmp_path / "large", "cola", 500, "full", 0, 0.5, model="larger")
    with pytest.raises(ConfigError, match=r"runs of 2 backbones \(larger, tiny\)"):
        report.report("table1", [str(small), str(tmp_path / "large")], tmp_path / "out")
    (small / "cola-100-full-0" / "results.json").write_text("{")
    (small / "cola-100-full-1" / "results.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        report.report("table1", [str(small), str(tmp_path / "none")], tmp_path / "out")
    reported = "\n".join(caught.value.problems)
    (small / "cola-100-full-0" / "results.json").write_text(
        (tmp_path / "large" / "cola-500-full-0" / "results.json").read_text()
    )
    (small / "cola-100-full-0" / "config.yaml").write_text("[]")
    with pytest.raises(ConfigError, match=r"cola-100-full-0/config.yaml is damaged"):
        results.read(small / "cola-100-full-0" / "results.json")
    assert (
        "results.json is damaged" in reported
        and "is not the results.json of a run: it has no task" in reported
        and "none has no results.json" in reported
    )
    assert not (tmp_path / "out").exists()


def test_results_without_a_config_are_read_too(tmp_path):
    made = leave_run(tmp_path / "runs", "cola", 500, "lora", 0, 0.25)
    (tmp_path / "flat").mkdir()
    (made / "results.json").rename(tmp_path / "flat" / "cola-lora-0.json")
    run = results.load([str(tmp_path / "flat")])[0]
    assert (run.method, run.task, run.k, run.seed, run.backbone) == (
        "lora",
        "cola",
        500,
        0,
        runs.UNKNOWN,
    )
    assert "25.00" in "".join(report.report("table1", [str(tmp_path / "flat")], tmp_path / "out"))


def test_every_subset_of_submodules_has_a_name():
    named = {
        "al": "UniPELT (AL)",
        "pl_nogate": "UniPELT (PL), NoGate",
        "lora_gated": "LoRA, gated",
        "apl": "UniPELT (APL)",
        "apl+parallel_adapter_nogate": "UniPELT (APL+parallel_adapter), NoGate",
        "parallel_adapter_gated": "Parallel adapter, gated",
        "lora_frozen": "LoRA, frozen head",
        "lora_gated_frozen": "LoRA, gated, frozen head",
        "al_nogate_frozen: slow": "UniPELT (AL), NoGate, frozen head: slow",
    }
    assert {method: runs.name_of(method) for method in named} == named


def test_a_frozen_head_makes_another_method_in_folders_and_tables(tmp_path):
    for method in ("bitfit", "lora", "lora_frozen", "full", "ap"):
        leave_run(tmp_path / "runs", "cola", 100, method, 0, 0.5)
    loaded = results.load([str(tmp_path / "runs")])
    results.write_csv(loaded, tmp_path / "runs.csv")
    frame = pd.read_csv(tmp_path / "runs.csv").set_index("trial")
    assert frame.loc["cola-100-lora_frozen-0", "results.method.head"] == "frozen"
    assert pd.isna(frame.loc["cola-100-lora-0", "results.method.head"])  # older runs: trained
    for read in (loaded, results.load([str(tmp_path / "runs.csv")])):
        assert sorted((run.row for run in read), key=runs.position) == [
            "full",
            "bitfit",
            "lora",
            "lora_frozen",
            "ap",
        ]
    screen = report.report("table1", [str(tmp_path / "runs.csv")], tmp_path / "out")
    shown = [line.split("  ")[0] for line in screen if "50.00" in line]
    assert shown == ["Fine-tuning", "BitFit", "LoRA", "LoRA, frozen head", "UniPELT (AP)"]


def test_methods_without_a_place_in_the_paper_come_last():
    rows = ["lora: slow", "al", "apl_nogate", "lora_gated", "lora_frozen", "lora"]
    assert sorted(rows, key=runs.position) == [
        "lora",
        "lora_frozen",
        "apl_nogate",
        "al",
        "lora: slow",
        "lora_gated",
    ]


def test_runs_that_differ_in_the_seed_of_training_all_count(tmp_path):
    for seed, score in {43: 0.1, 44: 0.3}.items():
        path = (
            leave_run(tmp_path / "runs", "cola", 100, "apl", f"s0_{seed}", score) / "results.json"
        )
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"seeds": {"data": 0, "train": seed}})
        )
    screen = report.report("table1", [str(tmp_path / "runs")], tmp_path / "out")
    assert (
        read_cells(tmp_path / "out" / "table1.csv")[
            "[K = 100] Test Performance", "apl", "scaleup", "cola"
        ]["mean"]
        == "20.0"
    )
    assert any("2 runs, seeds 0 (training 43), 0 (training 44)." in line for line in screen)
    leave_run(tmp_path / "other", "cola", 100, "apl", 0, 0.9).rename(
        tmp_path / "other" / "cola-100-apl_slow-0"
    )  # another setting, another seed: not in that mean
    report.report("table1", [str(tmp_path / "runs"), str(tmp_path / "other")], tmp_path / "out")
    found = read_cells(tmp_path / "out" / "table1.csv")
    assert [
        found["[K = 100] Test Performance", row, "scaleup", "cola"]["mean"]
        for row in ("apl: apl", "apl: apl_slow")
    ] == ["20.0", "90.0"]


def test_settings_in_which_methods_differ_are_noted(small, tmp_path):
    path = small / "cola-100-apl-0" / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            yaml.safe_load(path.read_text())
            | {"train": {"seed": 0, "learning_rate": 0.1, "num_train_epochs": 12}}
        )
    )
    screen = report.report("table1", [str(small)], tmp_path / "out")
    assert any(
        "Runs of one method differ in train.learning_rate (0.1, not set); "
        "train.num_train_epochs (12, not set)." in line
        for line in screen
    )
    other = small / "cola-100-apl-1" / "config.yaml"
    other.write_text(
        yaml.safe_dump(
            yaml.safe_load(path.read_text()) | {"data": yaml.safe_load(other.read_text())["data"]}
        )
    )
    shutil.rmtree(small / "mrpc-100-apl-0")
    screen = report.report("table1", [str(small)], tmp_path / "out")
    assert any(
        "Methods differ in train.num_train_epochs (12, not set)." in line for line in screen
    ) and not any("Runs of one" in line for line in screen)


def test_scores_of_two_metrics_are_not_compared(small, tmp_path):
    path = small / "cola-100-apl-0" / "results.json"
    path.write_text(path.read_text().replace("matthews", "accuracy"))
    with pytest.raises(
        ConfigError,
        match="runs of cola were scored by accuracy and matthews; give those of one metric",
    ):
        report.report("table1", [str(small)], tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": {"train": 0}},
        {"seeds": {"data": "0", "train": 0}},
        {"examples": {}},
        {"parameters": {}},
        {"method": {"name": "unipelt"}},
        {"method": {"name": "magic"}},
        {"test": {"accuracy": 0.5}},
        {"test": {"matthews": None}},
        {"test": {"matthews": "high"}},
        {"dev": {"matthews": float("inf")}},
        {"test": 3},
        {"gates": {"layer": {"lora": {"mean": 0.5}}}},
        {"gates": {"layer": {"magic": {"mean": 0.5, "std": 0.1}}}},
    ],
    ids=str,
)
def test_damaged_results_are_named_and_no_report_is_made(small, tmp_path, changes):
    path = small / "cola-100-apl-0" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=f"{path} is damaged .*; run it again, or leave it out"):
        report.report("table1", [str(small)], tmp_path / "out")


def test_runs_that_differ_beyond_the_table_are_noted(small, tmp_path):
    path = small / "cola-100-full-1" / "config.yaml"
    path.write_text(path.read_text().replace("max_length: 64", "max_length: 96"))
    assert "Runs of one method differ in data.max_length (64, 96)." in report.report(
        "table1", [str(small)], tmp_path / "out"
    )


def test_a_setting_that_only_some_runs_of_a_method_have_is_noted(small, tmp_path):
    path = small / "cola-100-full-1" / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    path.write_text(
        yaml.safe_dump(settings | {"train": settings["train"] | {"lr_scheduler_type": "constant"}})
    )
    assert (
        "Runs of one method differ in train.lr_scheduler_type (constant, not set)."
        in report.report("table1", [str(small)], tmp_path / "out")
    )


def test_a_setting_of_null_is_the_same_as_one_that_is_not_set(small, tmp_path):
    path = small / "cola-100-full-1" / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["train"]["gate_learning_rate"] = None
    path.write_text(yaml.safe_dump(settings))
    assert "gate_learning_rate" not in report.report("table1", [str(small)], tmp_path / "out")


def test_several_settings_of_one_method_have_the_names_of_the_sweep(tmp_path):
    for name, score in {"lora_slow": 0.3, "lora_fast": 0.6}.items():
        leave_run(tmp_path / "runs", "cola", 100, "lora", 0, score).rename(
            tmp_path / "runs" / f"cola-100-{name}-0"
        )
    leave_run(tmp_path / "runs", "cola", 100, "full", 0, 0.5)
    screen = report.report("table1", [str(tmp_path / "runs")], tmp_path / "out")
    found = {
        row: line["mean"]
        for (_, row, source, column), line in read_cells(tmp_path / "out" / "table1.csv").items()
        if (source, column) == ("scaleup", "cola")
    }
    assert (found["lora: lora_slow"], found["lora: lora_fast"], found["full"], found["lora"]) == (
        "30.0",
        "60.0",
        "50.0",
        "",
    )
    assert (
        any(line.startswith("LoRA: lora_fast") for line in screen)
        and "LoRA at K = 100" not in screen[-2]
        and "Adapter at K = 100" in screen[-2]
    )


def test_a_table_of_runs_gives_the_same_reports_as_their_folder(small, tmp_path):
    path = small / "cola-100-apl-0" / "results.json"
    content = json.loads(path.read_text())
    content["test"]["loss"] = float("nan")
    content["gates"] = {"encoder.layer.0.attention": {"lora": {"mean": 0.5, "std": 0.125}}}
    path.write_text(json.dumps(content))
    settings = yaml.safe_load((path.parent / "config.yaml").read_text())
    settings["train"] |= {"deepspeed": None, "optim": "", "lr_scheduler_type": "5e-4", "bf16": True}
    (path.parent / "config.yaml").write_text(yaml.safe_dump(settings))
    from_folder = results.load([str(small)])
    results.write_csv(from_folder, tmp_path / "runs.csv")
    from_table = results.load([str(tmp_path / "runs.csv")])
    flattened = [
        [json.dumps(run.results, sort_keys=True) for run in runs_read]
        for runs_read in (from_folder, from_table)
    ]
    assert flattened[0] == flattened[1]
    for name in ("settings", "facts", "row", "k", "seed", "task", "backbone"):
        assert [getattr(run, name) for run in from_table] == [
            getattr(run, name) for run in from_folder
        ]
    for name, path in {"folder": small, "table": tmp_path / "runs.csv"}.items():
        report.report("table6", [str(path)], tmp_path / name)
    for file in ("table6.md", "table6.csv"):
        assert (tmp_path / "folder" / file).read_text() == (tmp_path / "table" / file).read_text()


def test_a_table_of_runs_begins_with_a_summary_that_pandas_reads(small, tmp_path):
    results.write_csv(results.load([str(small)]), tmp_path / "runs.csv")
    frame = pd.read_csv(tmp_path / "runs.csv")
    assert tuple(frame.columns[: len(results.SUMMARY)]) == results.SUMMARY
    means = frame[frame.k == 100].groupby(["task", "method"]).test.mean()
    assert means["cola", "adapter"] == pytest.approx(0.25)


def test_damaged_rows_of_a_table_and_other_files_are_refused(small, tmp_path):
    table = tmp_path / "runs.csv"
    results.write_csv(results.load([str(small)]), table)
    frame = pd.read_csv(table, dtype=str, keep_default_na=False)
    frame.loc[0, "results.seeds.data"] = "many"
    frame.to_csv(table, index=False)
    with pytest.raises(ConfigError, match=rf"{table}, row cola-100-adapter-0, is damaged"):
        results.load([str(table)])
    table.write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="is not a table of runs"):
        results.load([str(table)])
    table.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is damaged"):
        results.load([str(table)])


def test_a_config_whose_aliases_multiply_is_refused_at_once(tmp_path):
    out = leave_run(tmp_path, "cola", 100, "apl", 1, 0.5)
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    (out / "config.yaml").write_text("\n".join(lines))
    begin = time.perf_counter()
    with pytest.raises(ConfigError, match="config.yaml is damaged .*aliases"):
        results.load([str(out)])
    assert time.perf_counter() - begin < 5


@pytest.mark.parametrize(
    "table",
    [
        "trial,results.task,results.a,results.a.b\nx,cola,1,2\n",
        "trial,results.task,results.dev\nx,cola," + "[" * 100_000 + "\n",
    ],
)
def test_a_table_that_no_sweep_wrote_is_refused(tmp_path, table):
    (tmp_path / "table.csv").write_text(table)
    with pytest.raises(ConfigError, match="is damaged|has no"):
        results.load([str(tmp_path / "table.csv")])


def test_an_absurd_number_of_parameters_is_damage(small):
    path = small / "cola-100-full-0" / "results.json"
    content = json.loads(path.read_text())
    content["parameters"]["stored"] = 10**400
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="parameters.stored"):
        results.load([str(small)])


def test_what_is_no_file_of_the_benchmark_is_named(small, tmp_path):
    folder = tmp_path / "bench"
    folder.mkdir()
    os.mkfifo(folder / "pipe.json")
    (folder / "endless.json").symlink_to("/dev/zero")
    (folder / "folder.json").mkdir()
    (folder / "deep.json").write_text("[" * 100_000)
    times = {"what": "training", "geometry": "bert-base", "batch": 1, "length": 8, "device": 5}
    rows = {"full fine-tuning": {"ratio": 1.0}}
    (folder / "times.json").write_text(json.dumps({"settings": times, "rows": rows}))
    lines = report.report("table4", [str(small)], tmp_path / "out", [str(folder)])
    for name in ("pipe", "endless", "folder", "deep"):
        assert any(f"{name}.json is not a file of the benchmark" in line for line in lines)
    assert any("Training times from times.json (bert-base, 1 x 8 tokens, 5)" in x for x in lines)


def change(folder, **entries) -> None:
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_run_on_a_stream_is_read(tmp_path):
    made = leave_run(tmp_path / "runs", "reviews", "all", "lora", 0, 0.5)
    change(made, examples={"train": None, "dev": 2, "test": 2}, test_is_dev=False)
    assert results.load([str(tmp_path / "runs")])[0].k == "all"
    (made / "config.yaml").unlink()
    assert results.load([str(tmp_path / "runs")])[0].k == "all"
    results.write_csv(results.load([str(tmp_path / "runs")]), tmp_path / "t.csv")
    assert len(results.load([str(tmp_path / "t.csv")])) == 1


def test_a_table_keeps_every_source_of_a_mixture(tmp_path):
    made = leave_run(tmp_path / "runs", "cola", 100, "lora", 0, 0.5)
    parts = [("train", "A"), ("train", "B"), ("test", "C")]
    change(made, sources=[{"split": split, "sha256": digest} for split, digest in parts])
    results.write_csv(results.load([str(tmp_path / "runs")]), tmp_path / "t.csv")
    assert results.load([str(tmp_path / "t.csv")])[0].results["sources"] == {
        "train": {"sha256": "A"},
        "train_2": {"sha256": "B"},
        "test": {"sha256": "C"},
    }


@pytest.mark.parametrize("name", ["table1", "differences"])
def test_seeds_of_sampling_and_of_training_stand_side_by_side(tmp_path, name):
    """With K all, nothing is sampled. With K = 100, all runs here have the same examples."""
    for k in (100, "all"):
        for method in ("lora", "apl"):
            for seed in range(2):
                made = leave_run(tmp_path / "runs", "reviews", k, method, seed, 0.5 + seed / 10)
                change(made, seeds={"data": 0, "train": seed}, test_is_dev=False)
    lines = report.report(name, [str(tmp_path / "runs")], tmp_path / "out")
    assert "Missing: nothing." in lines
