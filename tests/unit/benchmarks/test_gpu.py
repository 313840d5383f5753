"""The script that measures on a GPU: its commands, its time limits, and a dry run on a CPU."""

import argparse
import json
import time

import pytest

from benchmarks import gpu, gpu_checks
from benchmarks.gpu import APL, BOUND, FULL, LORA, Measurement
from scaleup.cli import bench as command
from scaleup.cli.entry import main as scaleup
from scaleup.experiments import call_counts


def write_rows(words: list[str], **rows: dict) -> None:
    with open(words[words.index("--output") + 1], "w") as file:
        json.dump({"rows": rows}, file)


def test_every_command_is_one_that_the_programs_take():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.configure(parser)
    planned = list(gpu.measurements(dry_run=False))
    assert planned[0].words == ["-m", "benchmarks.gpu_checks", "--device", "cuda"]
    for measurement in planned[1:]:
        assert measurement.words[:3] == ["-m", "scaleup", "bench"]
        options = parser.parse_args(measurement.words[3:])
        assert options.device == "cuda" and options.reference == options.only[0]
    names = [measurement.name for measurement in planned]
    assert len(names) == len(set(names))
    for size in gpu.SIZES:
        assert {f"eager-{size}", f"graphs-{size}", f"compiled-{size}-APL"} <= {*names}
    budgets = gpu.CHECKS_SECONDS + sum(seconds for _, seconds in gpu.WAYS.values())
    assert gpu.SECONDS < 9 * 60 - 10 < budgets, "a part that ends early leaves its time to others"


def test_what_does_not_fit_is_skipped_and_earlier_files_are_no_results(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(gpu, "WAYS", {"eager": ([], 100), "graphs": ([], 30)})
    now, seen = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def runner(words: list[str], seconds: float) -> int | None:
        seen.append((words[0], seconds))
        now[0] += min(seconds, 40)
        return None if seconds < 40 else int(words[0] == "b")

    planned = [Measurement("eager", name, [name]) for name in "abc"]
    planned += [Measurement("graphs", name, [name]) for name in "de"]
    planned += [Measurement("eager", "f", ["f"])]
    (tmp_path / "f.json").write_text("{}")
    assert gpu.run(planned, tmp_path, 1000, runner) == 1
    assert seen == [("a", 100), ("b", 60), ("c", 20), ("d", 30)]
    out = capsys.readouterr().out
    assert "b: failed with exit code 1" in out and "c: cut off" in out and "d: cut off" in out
    assert "e: skipped" in out and "f: skipped" in out
    assert not (tmp_path / "f.json").exists()
    seen.clear()
    gpu.run(planned, tmp_path, 50, runner)
    assert seen == [("a", 50), ("b", 10)], "the whole limit counts too"


def test_the_summary_divides_by_the_lower_bound_and_the_peak_of_lora(tmp_path):
    rows = {
        BOUND: {"milliseconds": 10.0, "calls": 400, "peak": 2**30},
        LORA: {"milliseconds": 15.0, "calls": 600, "peak": 2 * 2**30},
        APL: {"milliseconds": 20.0, "calls": 800, "peak": 2**31 + 2**28},
    }
    size = "bert-base-16x128"
    write_rows(["--output", str(tmp_path / f"eager-{size}.json")], **rows)
    for name in (BOUND, APL):
        file = tmp_path / f"compiled-{size}-{name}.json"
        write_rows(["--output", str(file)], **{name: {"milliseconds": rows[name]["milliseconds"]}})
    summary = gpu.summary(tmp_path)[size]
    assert summary["eager"][APL] == {
        "milliseconds": 20.0,
        "ratio": 2.0,
        "peak_mib": 2304,
        "peak_ratio": 1.125,
        "us_per_call": 25.0,
    }
    assert summary["compiled"] == {
        APL: {"milliseconds": 20.0, "ratio": 2.0},
        BOUND: {"milliseconds": 10.0, "ratio": 1.0},
    }


def test_a_command_is_ended_when_its_time_is_up():
    assert gpu.run_command(["-c", "raise SystemExit(3)"], 60) == 3
    begin = time.monotonic()
    assert gpu.run_command(["-c", "import time; time.sleep(60)"], 0.5) is None
    assert time.monotonic() - begin < 30


def test_a_dry_run_checks_and_times_on_a_cpu(tmp_path, monkeypatch, capsys):
    for name, value in command.STEADY_ALLOCATOR.items():
        monkeypatch.setenv(name, value)  # or the command would start this process again
    families = {name: call_counts.FAMILIES[name] for name in ("BERT", "Llama")}
    monkeypatch.setattr(call_counts, "FAMILIES", families)
    monkeypatch.setattr(gpu_checks, "CALLS", 10)

    def in_this_process(words: list[str], seconds: float) -> int | None:
        if "--compile" in words:  # takes too long here
            return None
        main = {"benchmarks.gpu_checks": gpu_checks.main, "scaleup": scaleup}[words[1]]
        return main(words[2:])

    assert gpu.main(["--dry-run", "--output", str(tmp_path)], in_this_process) == 0
    checks = json.loads((tmp_path / "checks.json").read_text())
    kinds = [name.split(",")[0] for name in checks]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "merge": 27,
        "narrow": 36,
        "attention": 15,
        "model": 8,
        "host": 3,
    }
    summary = json.loads((tmp_path / "summary.json").read_text())
    rows = summary["bert-base-16x128"]["eager"]
    assert set(rows) == {BOUND, LORA, APL, FULL}
    assert rows[BOUND]["ratio"] == 1 and rows[APL]["us_per_call"] > 0
    assert "compiled-bert-base-16x128-APL: cut off" in capsys.readouterr().out


def test_a_wrong_kernel_fails_the_checks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_checks, "attention_results", lambda device: ())
    monkeypatch.setattr(gpu_checks, "model_results", lambda device: ())
    monkeypatch.setattr(gpu_checks, "host_results", lambda device: ())
    monkeypatch.setattr(gpu_checks, "SITES", ((2, 16, 4, 2),))
    right = gpu_checks.ops.narrow_backward

    def wrong(*arguments):
        return right(*arguments) * 1.1

    monkeypatch.setattr(gpu_checks.ops, "narrow_backward", wrong)
    out = tmp_path / "checks.json"
    assert gpu_checks.main(["--device", "cpu", "--output", str(out)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert len(failed) == 12 and all("narrow" in line for line in failed)


@pytest.mark.parametrize("value", [float("nan"), 0.2])
def test_an_error_that_is_no_number_or_too_large_is_found(value, tmp_path, monkeypatch):
    results = (("merge", {"error": value, "limit": 0.1}),)
    monkeypatch.setattr(gpu_checks, "kernel_results", lambda device: results)
    monkeypatch.setattr(gpu_checks, "attention_results", lambda device: ())
    monkeypatch.setattr(gpu_checks, "model_results", lambda device: ())
    monkeypatch.setattr(gpu_checks, "host_results", lambda device: ())
    assert gpu_checks.main(["--device", "cpu", "--output", str(tmp_path / "c.json")]) == 1
