"""Run the common tests of PEFT's own test suite for UNIPELT.

    python -m benchmarks.peft_suite --output results/peft_suite.json

PEFT's source archive contains `tests/testing_common.py`, from which PEFT tests every method. The
archive of the pinned version (1 MB) is downloaded into `--downloads`, and nothing of it is stored
here. UNIPELT stands in for PEFT's LoRA, so that the tests of what only LoRA does run too. The
models are the tiny ones of our tests. Tests of prompt learning are left out.

The exit status is 1 if a case fails for which `EXCEPTIONS` gives no reason, or if a case passes for
which it gives one.
"""

import argparse
import contextlib
import importlib
import io
import pathlib
import sys
import tarfile
import tempfile
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import transformers

from benchmarks.cases import write_result
from benchmarks.downloads import Archive, fetch
from scaleup import UniPeltConfig
from scaleup.machine import versions
from tests.utils.tiny import backbone

ARCHIVE = Archive(
    "peft==0.21.2",
    "peft-0.21.2.tar.gz",
    "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e",
    983_614,
    ("--no-deps", "--no-binary", "peft"),
)
DOWNLOADS = pathlib.Path("build/downloads")
PACKAGE = "peft_own_tests"  # "tests" are ours

SIZES = {"adapter_size": 8, "prefix_length": 3, "prefix_hidden_size": 8, "init_lora_weights": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "unipelt": SIZES,
    "nogate": SIZES | {"gates": "none"},
    "lora": {"submodules": ["lora"], "init_lora_weights": False},
}
# Name → family of the tiny model, name of the auto class, task type.
MODELS = {
    "encoder": ("bert", "AutoModel", "FEATURE_EXTRACTION"),
    "decoder": ("llama", "AutoModelForCausalLM", "CAUSAL_LM"),
    "encoder-decoder": ("t5", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
}
ENCODER, DECODER, ENCODER_DECODER = MODELS
# Name → method of PEFT's tester and further arguments.
TESTS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (f"_test_{name}", {})
    for name in (
        "model_attr",
        "adapter_name",
        "prepare_for_training",
        "load_model_low_cpu_mem_usage",
        "save_pretrained",
        "save_pretrained_selected_adapters",
        "save_pretrained_adapter_name_substring",
        "from_pretrained_config_construction",
        "load_multiple_adapters",
        "merge_layers_fp16",
        "merge_layers_nan",
        "merge_layers",
        "merge_layers_multi",
        "merge_layers_is_idempotent",
        "safe_merge",
        "mixed_adapter_batches",
        "generate_with_mixed_adapter_batches_and_beam_search",
        "generate",
        "generate_half_prec",
        "training",
        "inference_safetensors",
        "training_layer_indexing",
        "peft_model_device_map",
        "delete_adapter",
        "delete_inactive_adapter",
        "delete_unknown_adapter_raises",
        "unload_adapter",
        "weighted_combination_of_adapters",
        "disable_adapter",
        "adding_multiple_adapters_with_bias_raises",
        "lora_conversion",
        "get_base_model_state_dict",
    )
} | {
    "save_pretrained_pickle": ("_test_save_pretrained", {"safe_serialization": False}),
    "add_adapter_bfloat16": (
        "_test_add_adapter_no_autocast_adapter_dtype",
        {"dtype": torch.bfloat16},
    ),
    "add_adapter_float16": (
        "_test_add_adapter_no_autocast_adapter_dtype",
        {"dtype": torch.float16},
    ),
    "checkpointing": ("_test_training_gradient_checkpointing", {"use_reentrant": False}),
    "checkpointing_reentrant": ("_test_training_gradient_checkpointing", {"use_reentrant": True}),
    "passing_input_embeds_works": ("_test_passing_input_embeds_works", {"test_name": ""}),
    "generate_pos_args": ("_test_generate_pos_args", {}),
}
# Tests that a kind of model cannot take, for reasons that have nothing to do with the method.
INAPPLICABLE = {
    ENCODER: {
        "disable_adapter",  # it generates, and so do the others
        "mixed_adapter_batches",
        *(name for name in TESTS if name.startswith("generate")),
    },
    DECODER: set(),
    ENCODER_DECODER: {
        "passing_input_embeds_works",  # the decoder's tokens are missing
        "safe_merge",  # safetensors refuses to write tied embeddings
    },
}


class ReasonFor(NamedTuple):
    """Why some tests are expected to fail for some configs, whatever the model is."""

    tests: tuple[str, ...]
    configs: tuple[str, ...]
    reason: str


EVERYTHING = ("unipelt", "nogate")
MERGES = tuple(name for name in TESTS if "merge" in name)
EXCEPTIONS = (
    ReasonFor(
        MERGES,
        EVERYTHING,
        "Only ungated LoRA alone can be merged exactly. A gate depends on the input, a prefix "
        "changes the softmax, and a bottleneck is nonlinear. The merge is refused.",
    ),
    ReasonFor(
        ("weighted_combination_of_adapters",),
        tuple(CONFIGS),
        "Adapters are not combined by their weights; add_weighted_adapter is refused.",
    ),
    ReasonFor(
        ("training_layer_indexing",),
        tuple(CONFIGS),
        "UniPELT sits in every layer; layers_to_transform is refused.",
    ),
    ReasonFor(
        ("adding_multiple_adapters_with_bias_raises",),
        tuple(CONFIGS),
        "UniPELT trains no biases of the backbone; bias='all' is refused before a second adapter "
        "is added.",
    ),
    ReasonFor(
        ("training", "checkpointing"),
        EVERYTHING,
        "The test takes parameters without `lora_` in their names for the backbone's, and asserts "
        "that they get no gradient. Gates, prefixes and bottlenecks do get one. "
        "tests/unit/unipelt/test_contract.py asserts the same with the right names.",
    ),
    ReasonFor(
        ("checkpointing_reentrant",),
        EVERYTHING,
        "Reentrant checkpointing loses the gradient of the prefix and is refused.",
    ),
)


def load_tester(downloads: pathlib.Path) -> Any:
    """Return PEFT's module `testing_common`, in which LoRA's config is UNIPELT's.

    Raises:
        AssetError: if the archive cannot be downloaded.
    """
    downloads.mkdir(parents=True, exist_ok=True)
    archive = fetch(ARCHIVE, downloads)
    folder = downloads / archive.name.removesuffix(".tar.gz")
    if not (folder / "tests" / "testing_common.py").exists():
        with tarfile.open(archive) as content:
            members = [m for m in content if m.name.startswith(f"{folder.name}/tests/")]
            content.extractall(downloads, members, filter="data")
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str((folder / "tests").resolve())]
    sys.modules[PACKAGE] = package
    if importlib.util.find_spec("diffusers") is None:  # imported for image models only
        diffusers = types.ModuleType("diffusers")
        diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
        sys.modules["diffusers"] = diffusers
    common: Any = importlib.import_module(f"{PACKAGE}.testing_common")
    common.LoraConfig = UniPeltConfig
    return common


def run_case(tester: Any, test: str, model: str, config: str, folder: pathlib.Path) -> str:
    """Run one test; return "passed", "skipped: …" or "failed: …"."""
    family, auto_class, task_type = MODELS[model]
    method, arguments = TESTS[test]
    if test == "generate_pos_args":  # PEFT refuses them for encoder-decoder models
        arguments = {"raises_err": model == ENCODER_DECODER}

    def inputs(self: Any = None) -> dict[str, torch.Tensor]:
        batch = {
            "input_ids": torch.tensor([[1, 1, 1], [1, 2, 1]]),
            "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]]),
        }
        if task_type == "SEQ_2_SEQ_LM":
            batch["decoder_input_ids"] = torch.tensor([[1, 1, 1], [1, 2, 1]])
        return batch

    instance = tester.PeftCommonTester()
    instance.transformers_class = getattr(transformers, auto_class)
    instance.prepare_inputs_for_testing = inputs
    kwargs = CONFIGS[config] | {"task_type": task_type}
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(instance, method)(
                model_id=str(folder / family),
                config_cls=UniPeltConfig,
                config_kwargs=kwargs,
                **arguments,
            )
    except pytest.skip.Exception as skipped:
        return f"skipped: {skipped.msg}"
    except (Exception, pytest.fail.Exception) as error:
        text = str(error).strip().split("\n")[0]
        return f"failed: {type(error).__name__}: {text}"[:300]
    return "passed"


def run(downloads: pathlib.Path, only: Callable[[str], bool]) -> dict[str, str]:
    """Return the outcome of each case, by "test/model/config"."""
    tester, outcomes = load_tester(downloads), {}
    with tempfile.TemporaryDirectory() as folder:
        for family, _, _ in MODELS.values():
            # The tests' tokens, 1 and 2, must not be padding, whose embedding is 0.
            model = backbone(family, pad_token_id=90, eos_token_id=91, decoder_start_token_id=90)
            model.save_pretrained(pathlib.Path(folder) / family)
        for case in cases():
            name = "/".join(case)
            if only(name):
                with contextlib.redirect_stderr(io.StringIO()):
                    outcome = run_case(tester, *case, pathlib.Path(folder))
                outcomes[name] = outcome.replace(folder, "models")
    return outcomes


def cases() -> Iterator[tuple[str, str, str]]:
    """Yield test, model and config of each case."""
    for test in TESTS:
        for model in MODELS:
            if test not in INAPPLICABLE[model]:
                yield from ((test, model, config) for config in CONFIGS)


def reason(case: str) -> str | None:
    """Return why a case is expected to fail, None if it should pass."""
    test, _, config = case.split("/")
    return next((e.reason for e in EXCEPTIONS if test in e.tests and config in e.configs), None)


def surprises(outcomes: dict[str, str]) -> dict[str, str]:
    """Return the cases that fail without a reason, or pass or are skipped in spite of one."""
    return {
        case: outcome
        for case, outcome in outcomes.items()
        if outcome.startswith("failed") != (reason(case) is not None)
    }


def report(outcomes: dict[str, str]) -> dict[str, Any]:
    """Return the counts, and the cases that did not pass with their reasons."""
    exceptions: dict[str, dict[str, str]] = {}
    for case, outcome in outcomes.items():
        if outcome.startswith("failed"):
            exceptions.setdefault(reason(case) or "unexpected", {})[case] = outcome
    skipped = [case for case, outcome in outcomes.items() if outcome.startswith("skipped")]
    return {
        "packages": versions("torch transformers peft"),
        "cases": len(outcomes),
        "counts": dict(Counter(outcome.split(":")[0] for outcome in outcomes.values())),
        "exceptions": exceptions,
        "skipped": {case: outcomes[case].removeprefix("skipped: ") for case in skipped},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, help="the results file")
    parser.add_argument("--downloads", type=pathlib.Path, default=DOWNLOADS)
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    options = parser.parse_args()
    outcomes = run(options.downloads, lambda case: options.only in case)
    content = report(outcomes)
    if options.output is not None:
        write_result(options.output, content)
    print(content["counts"])
    unexpected = surprises(outcomes)
    for case, outcome in unexpected.items():
        print(f"{case}  {outcome}  (expected: {reason(case) or 'passes'})")
    return 1 if unexpected else 0


if __name__ == "__main__":
    raise SystemExit(main())
