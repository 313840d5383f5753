"""The argument --checkpoint: the folder of a run is not one of its checkpoints."""

import pytest

from scaleup.errors import ConfigError
from scaleup.export.export import run
from scaleup.export.report import ExportOptions


@pytest.mark.parametrize(
    ("folders", "advice"),
    [
        (["checkpoint-9", "final", "best"], "give one of its checkpoints: --checkpoint {run}/best"),
        (["checkpoint-9", "final"], "give one of its checkpoints: --checkpoint {run}/final"),
        (
            ["checkpoint-9", "checkpoint-10"],
            "give one of its checkpoints: --checkpoint {run}/checkpoint-10",
        ),
        ([], "it has no checkpoint yet"),
    ],
)
def test_for_the_folder_of_a_run_a_checkpoint_in_it_is_suggested(tmp_path, folders, advice):
    folder = tmp_path / "run"
    for name in ("", *folders):
        (folder / name).mkdir()
    (folder / "config.yaml").touch()
    with pytest.raises(ConfigError) as caught:
        run(ExportOptions(checkpoint=folder, kind="exact", output=tmp_path / "export"))
    problem = f"--checkpoint: {folder} is the folder of a run; {advice.format(run=folder)}"
    assert caught.value.problems == [problem]
