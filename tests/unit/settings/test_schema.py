"""Settings: defaults, overrides, every kind of mistake and what is said about it, and that what is written loads again."""

import pytest
from transformers import TrainingArguments

from scaleup.errors import ConfigError
from scaleup.settings import loading as yamlfile
from scaleup.settings import rules
from scaleup.settings import schema as config
from scaleup.settings.schema import load

GLUE = "data.name=rte"
CHECKPOINTING = "train.gradient_checkpointing_kwargs"


@pytest.fixture(autouse=True)
def _fresh_folder(tmp_path, monkeypatch):
    """Relative paths in configs (runs/…) must not meet what lies in the checkout."""
    monkeypatch.chdir(tmp_path)


def problems(*overrides, path=None):
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return caught.value.problems


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# Defaults and what they mean


def test_the_defaults_are_the_papers():
    run = load(None, [GLUE])
    method, train = run.method, run.train
    assert (method.name, method.submodules, method.resolved_gates) == (
        "unipelt",
        ["adapter", "prefix", "lora"],
        "learned",
    )
    assert (
        method.adapter_size,
        method.adapter_activation,
        method.prefix_length,
        method.prefix_hidden_size,
    ) == (48, "relu", 10, 512)
    assert (method.r, method.lora_alpha, method.lora_dropout, method.prefix_reparameterization) == (
        8,
        16,
        0,
        "mlp",
    )
    assert (run.learning_rate, train.num_train_epochs, train.early_stopping_patience) == (
        5e-4,
        50,
        10,
    )
    assert (
        train.per_device_train_batch_size,
        train.warmup_steps,
        train.weight_decay,
        run.data.dev_size,
    ) == (16, 0.06, 0, 1000)
    assert run.model.name == "facebook/bart-large"


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        (["method=full"], 2e-5),
        (["method=bitfit"], 1e-3),
        (["method.submodules=[adapter]"], 1e-4),
        (["method.submodules=[prefix]"], 2e-4),
        (["method.submodules=[lora]"], 5e-4),
        (["method.submodules=[adapter, prefix]"], 5e-4),
        (["method=full", "train.learning_rate=0.1"], 0.1),
    ],
)
def test_the_learning_rate_is_the_papers_for_the_method_unless_set(overrides, rate):
    assert load(None, [GLUE, *overrides]).learning_rate == rate


@pytest.mark.parametrize(
    ("overrides", "gates"),
    [
        (["method.submodules=[lora]"], "none"),
        (["method.submodules=[lora]", "method.gates=learned"], "learned"),
        (["method.submodules=[lora, adapter]"], "learned"),
        (["method.gates=none"], "none"),
    ],
)
def test_one_submodule_alone_is_ungated_unless_asked_for(overrides, gates):
    assert load(None, [GLUE, *overrides]).method.resolved_gates == gates


def test_submodules_have_one_order_whatever_the_order_written():
    assert load(None, [GLUE, "method.submodules=[lora, adapter]"]).method.submodules == [
        "adapter",
        "lora",
    ]


@pytest.mark.parametrize("section", config.SECTIONS)
def test_every_setting_and_section_is_described(section):
    cls = config.SECTIONS[section]
    assert (cls.__doc__ or "").strip()
    assert [
        name for name, field in cls.model_fields.items() if not (field.description or "").strip()
    ] == []
    own = config._Train if section == "train" else cls
    shown = config.describe()
    assert [name for name in own.model_fields if f"  {section}.{name}" not in shown] == []


# Reading


def test_overrides_win_over_the_file_and_are_yaml(tmp_path):
    path = write(tmp_path, "data: {name: rte, k: 100}\ntrain: {seed: 1}\n")
    run = load(
        path,
        ["data.k=all", "data.dev_size=1000", "method.submodules=[lora, prefix]", "train.seed=7"],
    )
    assert (run.data.name, run.data.k, run.train.seed, run.method.submodules) == (
        "rte",
        "all",
        7,
        ["prefix", "lora"],
    )


def test_the_last_of_several_overrides_wins():
    assert load(None, [GLUE, "train.seed=1", "train.seed=2"]).train.seed == 2


@pytest.mark.parametrize("number", ["5e-4", "5E-4", "+5e-4", "0.5e-3", "0.0005"])
def test_numbers_with_an_exponent_are_numbers(tmp_path, number):
    parsed = yamlfile.parse(f"rate: {number}", "here")["rate"]
    assert isinstance(parsed, float) and parsed == 5e-4
    assert load(None, [GLUE, f"train.learning_rate={number}"]).learning_rate == 5e-4


def test_text_that_only_looks_like_a_number_stays_text():
    assert yamlfile.parse("[5e, e5, 1e-4b, 0x1e-4]", "here") == ["5e", "e5", "1e-4b", "0x1e-4"]


def test_a_method_may_be_named_in_short(tmp_path):
    assert load(write(tmp_path, "method: bitfit\ndata: {name: rte}\n")).method.name == "bitfit"
    assert load(None, [GLUE, "method=full"]).method.name == "full"


@pytest.mark.parametrize(
    "text", ["data: {name: rte}\ndata: {k: 5}\n", "data:\n  name: rte\n  k: 5\n  k: 6\n"]
)
def test_a_key_given_twice_is_refused(tmp_path, text):
    (problem,) = problems(path=write(tmp_path, text))
    assert "stands twice" in problem and "line" in problem


def test_anchors_and_merge_keys_work(tmp_path):
    text = "model: {name: org/model}\ntrain:\n  <<: {seed: 3, max_steps: 5}\n  seed: 4\ndata: &d {name: rte}\n"
    run = load(write(tmp_path, text))
    assert (run.train.seed, run.train.max_steps) == (4, 5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "found list"),
        ("just text", "found str"),
        ("data: 5", "data: expected settings, found 5"),
        ("\x07", "not valid YAML"),
    ],
)
def test_a_file_of_another_shape_is_one_plain_problem(tmp_path, text, said):
    assert any(said in problem for problem in problems(path=write(tmp_path, text)))


def test_an_unreadable_file_is_one_plain_problem(tmp_path):
    assert problems(path=str(tmp_path / "none.yaml")) == [
        f"{tmp_path}/none.yaml: cannot be read: No such file or directory"
    ]
    assert "cannot be read" in problems(path=str(tmp_path))[0]
    (tmp_path / "latin.yaml").write_bytes(b"model: {name: caf\xe9}")
    assert "not UTF-8 text" in problems(path=str(tmp_path / "latin.yaml"))[0]


def test_an_empty_section_means_its_defaults(tmp_path):
    assert load(write(tmp_path, "model:\ndata: {name: rte}\ntrain:\n")).train.seed == 42


# Mistakes


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.learning_rat=1", "learning_rate"),
        ("train.eval_step=5", "eval_steps"),
        ("method.prefix_len=5", "prefix_length"),
        ("data.trainfile=x", "train_file"),
        ("modle.name=x", "model"),
        ("tain.seed=1", "train"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_valid_one(override, nearest):
    assert any(
        "unknown" in problem and f"did you mean {nearest}?" in problem
        for problem in problems(GLUE, override)
    )


def test_a_name_like_none_of_ours_is_answered_without_a_guess():
    assert problems(GLUE, "train.zzzzqqqq=1") == ["train.zzzzqqqq: unknown setting"]


@pytest.mark.parametrize(
    "override", ["train", "train.seed", "=3", ".seed=3", "train.=3", "train=3", ""]
)
def test_an_override_of_another_shape_is_refused(override):
    assert any(
        "overrides look like section.key=value" in p or "unknown section" in p
        for p in problems(GLUE, override)
    )


def test_all_problems_are_reported_together(tmp_path):
    sections = [
        "modle: {}",
        "data: {name: rte, metric: spearman}",
        "method: {adapter_size: -1}",
        "train: {seed: x, do_eval: true}",
    ]
    path = write(tmp_path, "\n".join(sections))
    found = problems("model.nam=x", "nonsense", path=path)
    for start in (
        "modle:",
        "nonsense:",
        "model.nam:",
        "method.adapter_size:",
        "train.seed:",
        "train.do_eval:",
        "data.metric:",
    ):
        assert sum(problem.startswith(start) for problem in found) == 1, (start, found)
    assert len(found) == 7


def test_a_second_section_is_still_checked_when_another_is_invalid():
    idle = [
        "data.pad_to_max_length=true",
        "train.group_by_length=true",
        "method.prefix_hidden_size=4",
        "method.submodules=[lora]",
    ]
    found = problems(GLUE, *idle, "train.seed=x")
    assert any(p.startswith("train.seed") for p in found) and any(
        p.startswith("method.prefix_hidden_size") for p in found
    )


def test_the_value_found_is_shown_and_cut_when_long():
    (problem,) = problems(GLUE, f"train.seed={'x' * 5000}")
    assert "'xxxx" in problem and len(problem) < 300


def test_a_setting_with_alternatives_is_one_problem():
    assert len(problems(GLUE, "data.k=some")) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=full", "method.r=4"],
        ["method.submodules=[lora, adapter]", "method.prefix_length=5"],
        ["method.submodules=[prefix]", "method.r=4"],
        ["method.submodules=[prefix]", "method.gate_pooling=paper"],
        ["method.prefix_reparameterization=none", "method.prefix_hidden_size=64"],
        ["method.lora_alpha=4"],
        ["data.train_file=mine.csv"],
        ["data.dev_size=5"],
        ["data.seed=5"],
        ["data.pad_to_max_length=true", "train.group_by_length=false"],
        ["data.name=null", "data.train_file=a.csv", "data.task=seq2seq", "model.head_bias=prior"],
        [f"{CHECKPOINTING}={{use_reentrant: false}}"],
    ],
    ids=" ".join,
)
def test_a_setting_without_effect_is_refused(overrides):
    (problem,) = problems(GLUE, *overrides)
    assert problem.startswith(overrides[-1].partition("=")[0] + ": has no effect here (")


def test_saying_a_default_out_loud_is_no_mistake():
    assert load(None, [GLUE, "method=full", "method.r=8"]).method.name == "full"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([GLUE, "model.quantization=8bit", "method=full"], "model.quantization"),
        ([GLUE, "model.quantization=8bit", "method=bitfit"], "model.quantization"),
        ([GLUE, "model.name=./nowhere/at/all"], "model.name"),
        ([GLUE, "model.name=folder"], "model.name"),
        ([], "data"),
        ([GLUE, "data.task=regression"], "data.task"),
        (["data.name=stsb", "data.task=sequence_classification"], "data.task"),
        (["data.name=stsb", "data.metric=accuracy"], "data.metric"),
        (["data.train_file=a.csv", "data.metric=spearman"], "data.metric"),
        (["data.train_file=a.csv", "data.task=regression", "data.metric=f1"], "data.metric"),
        ([GLUE, "train.bf16=true", "train.fp16=true"], "train.fp16"),
        (
            [GLUE, "train.gradient_checkpointing=true", f"{CHECKPOINTING}={{use_reentrant: true}}"],
            CHECKPOINTING,
        ),
        ([GLUE, "train.deepspeed=zero4"], "train.deepspeed"),
        ([GLUE, "train.deepspeed=zero2", "train.use_cpu=true"], "train.use_cpu"),
        ([GLUE, "method.submodules=[]"], "method.submodules"),
        ([GLUE, "method.submodules=[lora, lora]"], "method.submodules"),
        ([GLUE, "method.lora_dropout=1"], "method.lora_dropout"),
    ],
    ids=str,
)
def test_a_combination_that_cannot_work_is_refused(tmp_path, overrides, key):
    (tmp_path / "folder").mkdir()
    (problem,) = problems(*overrides)
    assert problem.startswith(f"{key}: ") or (key == "data" and problem.startswith("data: "))


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e999"])
@pytest.mark.parametrize(
    "key",
    [
        "train.learning_rate",
        "train.num_train_epochs",
        "train.adam_epsilon",
        "method.lora_alpha",
        "train.max_grad_norm",
    ],
)
def test_numbers_that_are_not_finite_are_refused(key, value):
    assert any(
        problem.startswith(key)
        for problem in problems(GLUE, "data.k=10", "method.gates=none", f"{key}={value}")
    )


@pytest.mark.parametrize("key", ["data.seed", "train.seed"])
def test_a_seed_that_numpy_cannot_take_is_refused(key):
    assert problems(GLUE, "data.k=10", f"{key}={2**32}")[0].startswith(key)
    assert load(None, [GLUE, "data.k=10", f"{key}={2**32 - 1}"])


def test_a_path_the_system_refuses_to_look_at_is_no_crash():
    long = "a" * 5000
    assert problems(GLUE, f"model.name={long}/{long}/{long}")[0].startswith("model.name: no folder")
    assert problems(GLUE, f"train.deepspeed={long}")[0].startswith("train.deepspeed")
    assert problems(GLUE, f"train.output_dir={long}")[0].startswith("train.output_dir")


def test_the_folder_of_an_earlier_run_is_only_taken_up_when_asked(tmp_path):
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "config.yaml").write_text("x")
    (tmp_path / "file").write_text("x")
    assert "is not empty" in problems(GLUE, "train.output_dir=done")[0]
    assert load(None, [GLUE, "train.output_dir=done", "train.resume=auto"]).train.resume == "auto"
    assert "is a file" in problems(GLUE, "train.output_dir=file", "train.resume=auto")[0]


def test_further_checks_get_the_valid_sections_and_add_their_problems():
    seen = {}

    def check(sections):
        seen.update(sections)
        return ["data.train_file: no such file"]

    with pytest.raises(ConfigError) as caught:
        load(None, ["data.train_file=a.csv", "train.seed=x"], checks=[check])
    assert set(seen) == {"model", "method", "data"}
    assert (
        caught.value.problems[-1] == "data.train_file: no such file"
        and len(caught.value.problems) == 2
    )


# TrainingArguments


@pytest.mark.parametrize("name", sorted(config.MANAGED))
def test_a_field_the_run_decides_is_refused_with_the_reason(name):
    assert problems(GLUE, f"train.{name}=true") == [
        f"train.{name}: is decided by scaleup: {config.MANAGED[name]}"
    ]


def test_every_managed_field_exists_in_transformers():
    # load_best_model_at_end and the like are renamed now and then; a stale name here would protect nothing.
    assert set(config.MANAGED) - set(TrainingArguments.__dataclass_fields__) == set()


def test_fields_of_training_arguments_pass_through_with_their_types():
    run = load(
        None,
        [
            GLUE,
            "train.max_grad_norm=0.5",
            "train.lr_scheduler_type=cosine",
            "train.dataloader_num_workers=2",
        ],
    )
    arguments = run.train.training_arguments
    assert {
        k: arguments[k]
        for k in (
            "max_grad_norm",
            "lr_scheduler_type",
            "dataloader_num_workers",
            "weight_decay",
            "seed",
        )
    } == {
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "cosine",
        "dataloader_num_workers": 2,
        "weight_decay": 0.0,
        "seed": 42,
    }
    assert "adam_beta1" not in arguments, "what the user leaves alone keeps the Trainer's default"
    assert set(arguments) <= set(TrainingArguments.__dataclass_fields__)
    assert problems(GLUE, "train.max_grad_norm=much")[0].startswith("train.max_grad_norm: ")
    assert problems(GLUE, "train.lr_scheduler_type=circle")[0].startswith(
        "train.lr_scheduler_type: "
    )


# Writing


@pytest.mark.parametrize(
    "overrides",
    [
        [GLUE],
        [GLUE, "method=full", "data.k=100", "data.seed=3"],
        [GLUE, "method=bitfit", "train.max_steps=7", "train.max_grad_norm=0.5"],
        [GLUE, "method.submodules=[lora]", "method.lora_alpha=4", "train.learning_rate=1e-5"],
        [GLUE, "method.submodules=[lora]", "method.gates=learned", "method.gate_pooling=causal"],
        [
            GLUE,
            "method.submodules=[prefix, adapter]",
            "method.prefix_reparameterization=none",
            "train.report_to=[tensorboard, wandb]",
        ],
        [
            GLUE,
            "method.gates=none",
            "train.gradient_checkpointing=true",
            f"{CHECKPOINTING}={{use_reentrant: false}}",
        ],
        [
            "data.train_file='ünï code: 1.csv'",
            'data.text_column="5e-4"',
            "data.pad_to_max_length=true",
            "data.task=regression",
        ],
        [
            GLUE,
            "train.deepspeed=zero3",
            "train.bf16=true",
            "train.lr_scheduler_type=cosine",
            "train.warmup_steps=1e-2",
        ],
    ],
    ids=" ".join,
)
def test_what_is_written_loads_to_the_same_run(tmp_path, overrides):
    run = load(None, overrides)
    again = load(write(tmp_path, config.to_yaml(run)))
    assert again.dump() == run.dump() and config.to_yaml(again) == config.to_yaml(run)
    assert (
        again.learning_rate == run.learning_rate
        and again.method.resolved_gates == run.method.resolved_gates
    )
    idle = rules.without_effect({name: getattr(run, name) for name in config.SECTIONS})
    mine, theirs = run.model_dump(), again.model_dump()
    same = {"method.gates", "train.learning_rate"}  # resolved in the file
    for name in config.SECTIONS:
        differ = {f"{name}.{key}" for key in mine[name] if mine[name][key] != theirs[name][key]}
        assert differ - same - set(idle) == set()
    if run.data.k != "all":
        assert (again.data.seed, again.data.k) == (run.data.seed, run.data.k)


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("dataloader_num_workers", -1, "should be at least 0"),
        ("eval_accumulation_steps", 0, "should be at least 1"),
        ("adam_beta1", 2, "below 1"),
        ("max_steps", 0, "0 steps train nothing"),
    ],
)
def test_values_that_libraries_would_refuse_later_are_refused_now(key, value, words):
    found = rules.impossible({"train": config.TrainSettings(**{key: value})})
    assert any(problem.startswith(f"train.{key}: ") and words in problem for problem in found)


def test_an_output_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    found = rules.impossible(
        {"train": config.TrainSettings(output_dir=str(tmp_path / "file" / "run"))}
    )
    assert found == [f"train.output_dir: {tmp_path / 'file'} is a file"]


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert (
        config.TrainSettings(output_dir="~/run").output_dir == "/home/me/run"
        and config.ModelSettings(name="~/bert").name == "/home/me/bert"
    )
