"""What a sweep file says: trials, their settings, and what is refused."""

import collections
import hashlib
import json
import pathlib
import shutil

import pytest

from scaleup.errors import ConfigError
from scaleup.experiments import grid
from scaleup.settings.schema import load, to_yaml
from tests.utils.sweeps import sweep_file
from tests.utils.workspace import ROOT, make_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> pathlib.Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def test_every_combination_is_a_trial_with_its_own_settings_and_the_first_seed_comes_first(
    workspace, tmp_path
):
    made = grid.load(
        str(sweep_file(workspace, tmp_path, k=[32, 64], seeds=[0, 5])), ["train.max_steps=3"]
    )
    assert [trial.name for trial in made.trials] == [
        f"films-{k}-{m}-{s}" for s in (0, 5) for k in (32, 64) for m in ("lora", "apl")
    ]
    settings = made.trials[-2].settings
    assert (
        settings.data.k,
        settings.data.seed,
        settings.train.seed,
        settings.method.submodules,
    ) == (64, 5, 5, ["lora"])
    assert all(
        trial.settings.train.max_steps == 3 and trial.settings.train.resume == "auto"
        for trial in made.trials
    )
    assert {trial.settings.train.output_dir for trial in made.trials} == {
        str(tmp_path / "runs" / trial.name) for trial in made.trials
    }


def test_with_all_examples_the_seed_is_that_of_training_alone(workspace, tmp_path):
    validation = {
        "validation_file": str(workspace / "test.csv"),
        "train_file": str(workspace / "train.csv"),
    }
    base = {"model": {"name": str(workspace / "bert")}, "data": validation}
    trial = grid.load(str(sweep_file(workspace, tmp_path, base=base, k=["all"], seeds=[7]))).trials[
        0
    ]
    assert (
        trial.settings.train.seed == 7 and "data.seed=7" not in trial.arguments
    )  # it would be refused: nothing is sampled


def test_the_base_may_be_a_config_file_beside_the_sweep(workspace, tmp_path):
    (tmp_path / "base.yaml").write_text(
        f"model: {{name: {workspace / 'bert'}}}\n"
        f"data: {{train_file: {workspace / 'train.csv'}, dev_size: 32}}\n"
    )
    trial = grid.load(str(sweep_file(workspace, tmp_path, base="base.yaml"))).trials[0]
    assert (
        trial.arguments[:2] == ("--config", str(tmp_path / "base.yaml"))
        and trial.settings.data.dev_size == 32
    )


def test_problems_of_all_trials_are_reported_together_and_once(workspace, tmp_path):
    methods = {
        "lora": ["method.submodules=[lora]", "method.adapter_size=3"],
        "apl": ["method.sise=1"],
    }
    with pytest.raises(ConfigError) as caught:
        grid.load(str(sweep_file(workspace, tmp_path, methods=methods, seeds=[0, 1], k=[64, 5000])))
    problems = "\n".join(caught.value.problems)
    assert "films-64-lora-0 and 3 more: method.adapter_size: has no effect here" in problems
    assert "films-64-apl-0 and 3 more: method.sise: unknown setting" in problems
    assert (
        "films-5000-lora-0 and 3 more: data.k: 5000 examples" in problems
        and len(caught.value.problems) == 3
    )
    with pytest.raises(
        ConfigError,
        match="every run: train.lerning_rate: unknown setting; did you mean learning_rate",
    ):
        grid.load(str(sweep_file(workspace, tmp_path)), ["train.lerning_rate=1"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seds": [1]}, "seds: unknown setting; did you mean seeds?"),
        ({"seeds": [0, 0]}, "seeds: names a value twice"),
        ({"methods": ["full"]}, "methods: should be names with lists of overrides"),
        ({"methods": {"a-b": []}}, "methods: 'a-b' cannot be part of a folder's name"),
        ({"tasks": {"films": ["train.output_dir=x"]}}, "the sweep sets train.output_dir"),
        ({"threads": 0}, "threads: should be greater than 0"),
        (
            {"output": "~nobody-of-that-name/runs"},
            "output: ~nobody-of-that-name has no home folder here; write the full path",
        ),
        (
            {"base": "~nobody-of-that-name/run.yaml"},
            "base: ~nobody-of-that-name has no home folder here; write the full path",
        ),
        (
            {"k": [64], "seeds": {"0": ["seed=0"], "zero": ["seed=0"]}},
            "films-64-lora-zero and 1 more: the same run as another trial: an override makes",
        ),
        (
            {"methods": {"full": ["method=full", "train.seed=7"]}},
            "every run: train.seed: methods and seeds set it to different values",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_file_is_refused_in_plain_words(workspace, tmp_path, changes, words):
    with pytest.raises(ConfigError) as caught:
        grid.load(str(sweep_file(workspace, tmp_path, **changes)))
    assert words in str(caught.value)


def test_a_setting_that_an_earlier_version_did_not_write_has_its_default(workspace, tmp_path):
    trial = grid.load(str(sweep_file(workspace, tmp_path))).trials[0]
    trial.folder.mkdir(parents=True)
    lines = to_yaml(trial.settings).splitlines()
    assert "  head: trained" in lines
    (trial.folder / "config.yaml").write_text("\n".join(li for li in lines if "  head:" not in li))
    grid.check_same_run(trial.settings, trial.folder)
    frozen = load(None, [*trial.arguments, "method.head=frozen"])
    with pytest.raises(ConfigError, match="has a run with another method.head"):
        grid.check_same_run(frozen, trial.folder)


def test_a_folder_with_a_run_of_other_settings_is_refused(workspace, tmp_path):
    path = sweep_file(workspace, tmp_path)
    trial = grid.load(str(path)).trials[0]
    trial.folder.mkdir(parents=True)
    (trial.folder / "config.yaml").write_text(to_yaml(trial.settings))
    assert grid.load(str(path)).trials[0] == trial
    with pytest.raises(
        ConfigError, match="has a run with another train.num_train_epochs; choose another output"
    ):
        grid.load(str(path), ["train.num_train_epochs=2"])
    (trial.folder / "results.json").write_text('{"task": "st')
    with pytest.raises(
        ConfigError, match="results.json is damaged; remove the folder to run it again"
    ):
        grid.load(str(path))


@pytest.mark.parametrize("name", ["my runs #2", "a: b", "{a}", "[a]", "'a' b", "Läufe"])
def test_an_output_may_have_any_name(workspace, tmp_path, name):
    trial = grid.load(str(sweep_file(workspace, tmp_path, output=str(tmp_path / name)))).trials[0]
    assert trial.settings.train.output_dir == str(tmp_path / name / trial.name) == str(trial.folder)


def test_an_override_of_an_axis_that_makes_trials_alike_is_refused(workspace, tmp_path):
    with pytest.raises(
        ConfigError,
        match="films-64-lora-0 and 1 more: the same run as another trial: an override makes",
    ):
        grid.load(str(sweep_file(workspace, tmp_path, k=[32, 64])), ["data.k=48"])


def test_shards_divide_the_grid_and_patterns_select_from_it(workspace, tmp_path):
    trials = grid.load(str(sweep_file(workspace, tmp_path, k=[32, 64], seeds=[0, 1]))).trials
    parts = [grid.select(trials, shard=f"{i}/3") for i in (1, 2, 3)]
    assert collections.Counter(
        trial.name for part in parts for trial in part
    ) == collections.Counter(trial.name for trial in trials)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert [trial.name for trial in grid.select(trials, ["*-apl-1", "films-32-lora-0"])] == [
        "films-32-lora-0",
        "films-32-apl-1",
        "films-64-apl-1",
    ]
    for shard in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(ConfigError, match="is not i/n"):
            grid.select(trials, shard=shard)
    with pytest.raises(
        ConfigError, match="no trial is called films-64-lore-0; did you mean films-64-lora-0"
    ):
        grid.select(trials, ["films-64-lore-0"])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_sweeps_of_this_repository_are_valid(path, tmp_path, monkeypatch, data_dir):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "data").symlink_to(data_dir)
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")  # runs/… must not meet what lies in the real one
    made = grid.load(str(path))
    assert (
        str(made.output) == f"runs/{path.stem}" and f"{len(made.trials)} runs" in path.read_text()
    )


def test_the_base_in_a_run_folder_is_no_permission_to_execute_code(workspace, tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(workspace / "bert", model)
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    run.mkdir()
    (run / "environment.json").write_text("{}")
    (run / "config.yaml").write_text(f"model: {{name: {model}, trust_remote_code: true}}\n")
    path = str(sweep_file(workspace, tmp_path, base="run/config.yaml"))
    with pytest.raises(ConfigError, match="is the config of a run, and asks to run Python code"):
        grid.load(path)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ConfigError):  # the permission, on the command line
        grid.load(path, ["model.trust_remote_code=true"])
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"k": [{}]}, "cannot be part of a folder's name"),
        ({"seeds": [[1]]}, "cannot be part of a folder's name"),
        ({"k": list(range(1, 200)), "seeds": list(range(200))}, "it takes at most 10,000"),
        ({"methods": {"a" * 300: ["method=full"]}}, "File name too long"),
    ],
)
def test_names_and_numbers_of_trials_are_bounded(workspace, tmp_path, axes, words):
    with pytest.raises(ConfigError, match=words):
        grid.load(str(sweep_file(workspace, tmp_path, **axes)))


def test_results_of_a_trial_that_are_nested_too_deeply_are_damaged(workspace, tmp_path):
    path = sweep_file(workspace, tmp_path)
    trial = grid.load(str(path)).trials[0]
    trial.folder.mkdir(parents=True)
    (trial.folder / "config.yaml").write_text(to_yaml(trial.settings))
    (trial.folder / "results.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="results.json is damaged; remove the folder"):
        grid.load(str(path))


def test_a_finished_trial_whose_data_has_changed_is_refused(workspace, tmp_path):
    path, data = sweep_file(workspace, tmp_path), tmp_path / "mine.csv"
    data.write_text("text,label")
    trial = grid.load(str(path)).trials[0]
    trial.folder.mkdir(parents=True)
    (trial.folder / "config.yaml").write_text(to_yaml(trial.settings))
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    results = {"sources": [{"file": str(data), "sha256": digest}]}
    (trial.folder / "results.json").write_text(json.dumps(results))
    assert grid.load(str(path)).trials[0] == trial
    data.write_text("text,topic")
    with pytest.raises(ConfigError, match=r"a finished run, and .*mine.csv has changed since; "):
        grid.load(str(path))
