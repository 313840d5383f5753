"""Runs that learn to generate text: encoder-decoders and decoders, pairs, chats, packed rows."""

import json

import pytest
from safetensors.torch import load_file

from benchmarks.cases import start_cases
from scaleup.memory import plan
from scaleup.settings import schema as config
from scaleup.training.preflight import CHECKS
from tests.utils.workspace import ROOT, add_writer, environment, losses, writing

CASES = {
    "bart": ("bart", "seq2seq", ["data.max_target_length=8"]),
    "t5": (
        "t5",
        "seq2seq",
        ["data.max_target_length=8", "data.num_beams=2", "data.metric=rouge_l"],
    ),
    "llama": ("llama", "causal_lm", []),
    "llama-packed": ("llama", "causal_lm", ["data.packing=true", "data.max_length=40"]),
    "llama-writes": ("llama", "causal_lm", ["data.metric=exact_match", "data.max_target_length=4"]),
    "llama-chat": ("llama", "causal_lm", ["data.messages_column=messages"]),
    "llama-nf4": ("llama", "causal_lm", ["model.quantization=nf4"]),
    "llama-full": ("llama", "causal_lm", ["method=full"]),
    "gpt2-8bit": (
        "gpt2",
        "causal_lm",
        ["model.quantization=8bit", "train.gradient_checkpointing=true"],
    ),
}


def case(folder, out, name: str, *more: str) -> list[str]:
    family, task, changes = CASES[name]
    words = writing(
        folder, out, family, task, *changes, *more, file="chats" if "chat" in name else "pairs"
    )
    return [word for word in words if name != "llama-full" or not word.startswith("method.")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("writing")
    still = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    for family, changes in (
        ("bart", still),
        ("t5", {"dropout_rate": 0.0}),
        ("llama", {}),
        ("gpt2", {"n_embd": 64}),
    ):
        add_writer(folder, family, **changes)
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """Every case on one process."""
    cases = {name: case(folder, folder / "one" / name, name) for name in CASES}
    cases = {
        name: [
            *words,
            "train.learning_rate=0.01",
            "train.num_train_epochs=3",
            "train.per_device_train_batch_size=8",
        ]
        for name, words in cases.items()
    }
    assert start_cases(
        cases, folder / "one.json", 1, timeout=600, env=environment()
    ) == dict.fromkeys(cases)
    return folder / "one"


@pytest.mark.parametrize("name", CASES)
def test_a_run_learns_and_leaves_its_scores(runs, name):
    out = runs / name
    found = losses(out)
    assert sum(found[-2:]) < 0.99 * sum(found[:2]), found
    results = json.loads((out / "results.json").read_text())
    assert results["metric"] in results["test"] and results["test"]["loss"] > 0
    gates = results["gates"]
    assert bool(gates) == (name != "llama-full")
    assert all(0 < value["mean"] < 1 for parts in gates.values() for value in parts.values())


@pytest.mark.parametrize(
    "name, count", [("bart", 120), ("t5", 120), ("llama-writes", 120), ("llama", 0)]
)
def test_what_was_written_for_the_test_set_is_kept(runs, name, count):
    path = runs / name / "predictions.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    sources = list(
        dict.fromkeys(
            json.loads(line)["text"]
            for line in (runs.parent / "pairs_test.jsonl").read_text().splitlines()
        )
    )
    assert [line["text"] for line in lines] == (sources if count else [])
    for line in lines:
        assert set(line["references"]) == {line["text"].split()[1]} and isinstance(
            line["written"], str
        )


@pytest.mark.slow
def test_accumulating_gradients_gives_the_same_language_model(runs, folder):
    """Batches of 8 and of 4 give the same loss: it is a mean over the tokens of a step."""
    shared = ["train.group_by_length=false", "train.max_steps=4", "train.num_train_epochs=1"]
    cases = {
        f"{size}": case(
            folder,
            folder / "accumulate" / f"{size}",
            "llama",
            *shared,
            f"train.per_device_train_batch_size={size}",
            f"train.gradient_accumulation_steps={8 // size}",
        )
        for size in (8, 4)
    }
    assert start_cases(
        cases, folder / "accumulate.json", 1, timeout=300, env=environment()
    ) == dict.fromkeys(cases)
    assert losses(folder / "accumulate" / "8") == pytest.approx(
        losses(folder / "accumulate" / "4"), abs=1e-5
    )


RECIPES = {
    "bart_large_seq2seq": (
        "bart",
        ["data.text_column=text", "data.target_column=target", "data.max_target_length=8"],
        "pairs",
    ),
    "t5_3b": ("t5", ["data.max_target_length=8"], "pairs"),
    "llama_8b": ("llama", [], "chats"),
    "llama_70b": ("llama", [], "chats"),
    "qwen3_32b": ("qwen3", [], "pairs"),
}


def recipe(folder, name: str) -> list[str]:
    """Return the config with other paths, text lengths and number of steps."""
    family, more, file = RECIPES[name]
    if not (folder / family).exists():
        add_writer(folder, family)
    return [
        str(ROOT / "configs" / f"{name}.yaml"),
        f"model.name={folder / family}",
        f"data.train_file={folder / file}.jsonl",
        f"data.test_file={folder / file}_test.jsonl",
        "data.dev_size=16",
        "data.max_length=40",
        f"train.output_dir={folder / name}",
        "train.max_steps=2",
        "train.eval_strategy=steps",
        "train.eval_steps=2",
        "train.disable_tqdm=true",
        *([] if name in ("qwen3_32b", "llama_70b") else ["method.prefix_hidden_size=16"]),
        *more,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_passes_the_plan_with_a_tiny_model_of_its_class(folder, name):
    path, *words = recipe(folder, name)
    made = plan.make_plan(config.load(path, words, checks=CHECKS), 8, limit=2**30, configured=True)
    assert made.fits and made.counts["trained"] > 0


@pytest.mark.slow
def test_the_recipes_run_on_tiny_models_of_their_classes(folder):
    """Each recipe keeps its ZeRO stage and runs as one process."""
    cases = {name: recipe(folder, name) for name in RECIPES}
    assert start_cases(
        cases, folder / "recipes.json", 1, timeout=500, env=environment()
    ) == dict.fromkeys(cases)
    assert all((folder / name / "results.json").is_file() for name in RECIPES)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_give_what_one_gives(folder):
    def cases(processes: int, *more: str) -> dict[str, list[str]]:
        shared = [
            "data.metric=loss",  # for another one, ZeRO-3 would gather all weights for each token
            "train.group_by_length=false",
            "train.max_steps=4",
            f"train.per_device_train_batch_size={8 // processes}",
            *more,
        ]
        return {
            name: case(folder, folder / f"{processes}{''.join(more)}" / name, name, *shared)
            for name in ("llama", "bart")
        }

    alone = cases(1)
    assert start_cases(
        alone, folder / "alone.json", 1, timeout=300, env=environment()
    ) == dict.fromkeys(alone)
    for more in ("train.deepspeed=zero3",):
        both = cases(2, more)
        assert start_cases(
            both, folder / f"{more[-5:]}.json", 2, timeout=300, env=environment()
        ) == dict.fromkeys(both)
        for name in both:
            one, two = folder / "1" / name, folder / f"2{more}" / name
            if name != "bart":  # whose loss is a mean over batches, of 4 here and of 8 there
                assert losses(two) == pytest.approx(losses(one), abs=1e-5)
                a, b = (
                    load_file(run / "final" / "adapter_model.safetensors") for run in (one, two)
                )
                assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-5
            scores = [json.loads((run / "results.json").read_text())["test"] for run in (one, two)]
            assert scores[1] == pytest.approx(
                scores[0], abs=0.01 if name != "bart" else 0.1
            )  # a mean over batches, which are cut otherwise
