"""Mistakes in a config: every kind is refused with one plain sentence."""

import pytest

from scaleup.errors import ConfigError
from scaleup.settings.schema import load, stored
from tests.utils.configs import GLUE, problems, write

CHECKPOINTING = "train.gradient_checkpointing_kwargs"


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


@pytest.mark.parametrize("word", ["quickstart.yaml", "configs/quickstart.yml"])
def test_a_config_file_without_its_flag_is_recognised(word):
    shape = f"{word}: overrides look like section.key=value"
    assert problems(GLUE, word) == [f"{shape}; did you mean --config {word}?"]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data.k=ten", "data.k: must be a whole number or all; got 'ten'"),
        ("data.k=1.5", "data.k: must be a whole number or all; got 1.5"),
        ("data.k=0", "data.k: must be greater than or equal to 1 or all; got 0"),
        ("train.bf16=maybe", "train.bf16: must be auto or true or false; got 'maybe'"),
        ("train.report_to=5", "train.report_to: must be a list or a text; got 5"),
    ],
)
def test_the_alternatives_of_a_setting_are_one_sentence(override, problem):
    assert problems(GLUE, override) == [problem]


def test_problems_with_several_items_of_a_list_keep_their_values():
    (problem,) = problems(GLUE, "method.submodules=[one,two]")
    assert "(got 'one')" in problem and "(got 'two')" in problem


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
        ["method.use_rslora=true"],
        ["method.submodules=[prefix]", "method.lora_targets=attention"],
        ["data.train_file=mine.csv"],
        ["data.prompt_template='{text} '"],
        ["data.dev_size=5"],
        ["data.test_size=5"],
        ["data.name=null", "data.train_file=a.csv", "data.test_size=5"],
        ["data.seed=5"],
        ["data.pad_to_max_length=true", "train.group_by_length=false"],
        ["data.name=null", "data.train_file=a.csv", "data.task=seq2seq", "model.head_bias=prior"],
        ["data.name=null", "data.train_file=a.csv", "data.task=seq2seq", "method.head=frozen"],
        ["data.name=null", "data.train_file=a.csv", "data.task=causal_lm", "method.head=frozen"],
        [f"{CHECKPOINTING}={{use_reentrant: false}}"],
    ],
    ids=" ".join,
)
def test_a_setting_without_effect_is_refused(overrides):
    (problem,) = problems(GLUE, *overrides)
    assert problem.startswith(overrides[-1].partition("=")[0] + ": has no effect here (")


@pytest.mark.parametrize("method", ["method=full", "method=bitfit", "method=unipelt"])
def test_every_method_can_freeze_the_head(method):
    assert load(None, [GLUE, method]).dump()["method"]["head"] == "trained"
    assert load(None, [GLUE, method, "method.head=frozen"]).dump()["method"]["head"] == "frozen"
    assert problems(GLUE, method, "method.head=fixed") == [
        "method.head: should be 'trained' or 'frozen' (got 'fixed')"
    ]


@pytest.mark.parametrize("weight", [0.5, 2.5])
def test_the_seed_that_draws_rows_of_a_weighted_source_can_be_set(weight):
    own = [
        f"data.sources=[{{file: a.csv, weight: {weight}}}, {{file: b.csv}}]",
        "data.validation_file=c.csv",
    ]
    assert load(None, [*own, "data.seed=5"]).dump()["data"]["seed"] == 5


def test_saying_a_default_out_loud_is_no_mistake():
    assert load(None, [GLUE, "method=full", "method.r=8"]).method.name == "full"


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([GLUE, "model.quantization=8bit", "method=full"], "model.quantization"),
        ([GLUE, "model.quantization=8bit", "method=bitfit"], "model.quantization"),
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
        (
            [GLUE, "train.gradient_checkpointing=true", f"{CHECKPOINTING}={{use_reentrant: null}}"],
            CHECKPOINTING,
        ),
        (
            [GLUE, "train.gradient_checkpointing=true", CHECKPOINTING + """='{"a": true}'"""],
            CHECKPOINTING,
        ),
        ([GLUE, "train.deepspeed=zero2", "train.use_cpu=true"], "train.use_cpu"),
        ([GLUE, "method.submodules=[]"], "method.submodules"),
        ([GLUE, "method.submodules=[lora, lora]"], "method.submodules"),
        ([GLUE, "method.lora_dropout=1"], "method.lora_dropout"),
    ],
    ids=str,
)
def test_a_combination_that_cannot_work_is_refused(overrides, key):
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


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("dataloader_num_workers", -1, "should be greater than or equal to 0"),
        ("eval_accumulation_steps", 0, "should be greater than or equal to 1"),
        ("adam_beta1", 2, "less than 1"),
        ("max_steps", 0, "0 steps train nothing"),
    ],
)
def test_values_that_libraries_would_refuse_later_are_refused_now(key, value, words):
    found = problems(GLUE, f"train.{key}={value}")
    assert any(problem.startswith(f"train.{key}: ") and words in problem for problem in found)


def test_flash_attention_needs_half_precision():
    flash = "model.attention=flash"
    refused = problems(GLUE, flash, "train.bf16=false")
    assert [problem.partition(" computes")[0] for problem in refused] == ["model.attention: flash"]
    for half in ("train.bf16=auto", "train.bf16=true", "model.dtype=bfloat16"):
        assert load(None, [GLUE, flash, half]).model.attention == "flash"


def test_flash_attention_takes_no_packed_rows_in_compiled_steps():
    given = (
        "model.attention=flash",
        "data.task=causal_lm",
        "data.train_file=x",
        "data.packing=true",
    )
    assert any(
        problem.startswith("data.packing: with train.torch_compile, flash")
        for problem in problems(*given, "train.torch_compile=true")
    )


@pytest.mark.parametrize(
    "other, words",
    [
        ("train.deepspeed=zero2", "train.fsdp: cannot be combined with train.deepspeed"),
        ("train.torch_compile=true", "train.fsdp: cannot be combined with train.torch_compile"),
        ("train.cuda_graphs=true", "train.fsdp: cannot be combined with train.cuda_graphs"),
        ("train.fp16=true", "train.fsdp: cannot be combined with train.fp16"),
        ("model.quantization=nf4", "use model.quantization=8bit"),
        ("method.name=full", "use train.deepspeed=zero3"),
    ],
)
def test_what_fsdp_cannot_shard_or_run_is_refused(other, words):
    found = problems(GLUE, "train.fsdp=full", other)
    assert any(words in problem for problem in found), found


@pytest.mark.parametrize("setting", ["eval_steps", "save_steps"])
def test_steps_of_evaluation_need_an_evaluation_in_steps(setting):
    words = (GLUE, f"train.{setting}=5")
    reason = "has no effect here (train.eval_strategy is not steps); remove it"
    assert problems(*words) == [f"train.{setting}: {reason}"]
    load(None, [*words, "train.eval_strategy=steps"])


def test_a_run_of_an_earlier_version_may_have_settings_without_effect(tmp_path):
    path = write(tmp_path, "data: {name: rte}\ntrain: {eval_steps: 5}\n")
    assert "eval_steps" not in stored(path)["train"]
