"""The report command."""

from scaleup.cli import main
from scaleup.experiments import results


def test_the_command_reports_and_refuses(small, tmp_path, monkeypatch, capsys):
    def command(*arguments: str) -> int:
        return main(["report", *arguments])

    assert command("table1", "--runs", str(small)) == 0 and "Table 1" in capsys.readouterr().out
    assert (small / "report" / "table1.md").is_file()
    results.write_csv(results.load([str(small)]), tmp_path / "table.csv")
    assert command("table1", "--runs", str(tmp_path / "table.csv")) == 0
    capsys.readouterr()
    written = tmp_path / "table" / "report" / "table1.md"
    assert written.read_text() == (small / "report" / "table1.md").read_text()
    assert command("differences", "--runs", str(small)) == 0
    assert {path.name for path in (small / "report").iterdir()} == {
        "table1.md",
        "table1.csv",
        "differences.md",
        "differences.csv",
    }  # no figure, as there is no LoRA
    capsys.readouterr()
    assert (
        command("table1", "--runs", str(small), "--data", "dev") == 2
        and "--data: has no effect on table1" in capsys.readouterr().err
    )
    assert (
        command("table4", "--runs", str(small), "--bench", "none.json") == 2
        and "--bench: there is no none.json" in capsys.readouterr().err
    )
    assert command("gates") == 2 and "--run: which run?" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert (
        command("figure2") == 2
        and "--runs: runs/figure2 has no results.json" in capsys.readouterr().err
    )
