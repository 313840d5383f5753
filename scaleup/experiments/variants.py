"""The variants that `scaleup bench` compares: each method on one geometry with random weights.

A variant is a model and a function that does one step with it: a training step or a forward pass.
Every variant has its own weights, because shared weights would still be in the cache when the next
variant runs. With bfloat16 a variant is what a run with `train.bf16` makes of it: frozen weights in
bfloat16, trained weights in float32, and autocast.

The variant `lower-bound` is the least that training inside a frozen backbone can cost: gradients
pass through all activations but reach no weight of the backbone.
"""

import copy
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from scaleup.backbone.loading import empty_model
from scaleup.backbone.method import apply_method, task_type
from scaleup.errors import ConfigError
from scaleup.experiments import meter
from scaleup.experiments.batches import Batch, random_batch, with_labels
from scaleup.experiments.call_counts import FAMILIES, pass_gradients
from scaleup.export import fold
from scaleup.export.folder import FolderWriter
from scaleup.settings.schema import MethodSettings
from scaleup.training.graphs import StepGraphs
from scaleup.training.sampler import ResumableSampler
from scaleup.unipelt.config import UniPeltConfig
from scaleup.unipelt.sites import find_sites, head_names

# Dropout is off: it takes attention on a CPU off the fast path in every variant alike.
_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 2}
GEOMETRIES: dict[str, Callable[[], PretrainedConfig]] = {
    "bert-base": lambda: BertConfig(**_BERT),
    "bart-large": lambda: BartConfig(dropout=0.0, num_labels=2),
    "tiny": lambda: FAMILIES["BERT"][1](2),
    # Llama 3.1 8B as a language model.
    "llama-8b": lambda: LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        use_cache=False,
    ),
    "smollm2-135m": lambda: LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        use_cache=False,
    ),
}
LANGUAGE_MODELS = ("llama-8b", "smollm2-135m")  # the other geometries have a classification head
FLAT = {"prefix_reparameterization": "none"}
UNIPELT: dict[str, dict[str, Any]] = {
    "adapter": {"submodules": ["adapter"]},
    "prefix": {"submodules": ["prefix"], **FLAT},
    "lora": {"submodules": ["lora"]},
    "AP": {"submodules": ["adapter", "prefix"], **FLAT},
    "APL": dict(FLAT),
    "APL, prefix MLP": {},
    "NoGate": {"gates": "none", **FLAT},
}


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """The options of `scaleup bench`; the result file records them under `settings`.

    Attributes:
        what: inference, training, ragged or memory.
        texts: (GLUE task, folder with GLUE, tokenizer): the source of the lengths for `ragged`.
        reference: the variant to divide by; None: the first.
        compile: the mode of `torch.compile`; None: the models run without it.
        graphs: whether training steps are CUDA graphs, as with train.cuda_graphs.
        baseline: the interpreter of an environment with the baseline library, `adapters`.
        only: the variants that take part; empty: all.
    """

    what: str
    geometry: str = "bert-base"
    batch: int = 16
    length: int = 128
    ragged: bool = False
    texts: Sequence[str] | None = None
    examples: int = 256
    rounds: int = 15
    reference: str | None = None
    compile: str | None = None
    graphs: bool = False
    profile: bool = False
    baseline: str | None = None
    device: str = "cpu"
    dtype: str = "float32"
    only: Sequence[str] = ()
    output: pathlib.Path | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def config(self) -> PretrainedConfig:
        return GEOMETRIES[self.geometry]()

    @property
    def auto_class(self) -> Any:
        """Return the class of transformers' AutoModel family that has the geometry's head."""
        if self.geometry in LANGUAGE_MODELS:
            return AutoModelForCausalLM
        return AutoModelForSequenceClassification

    def backbone(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Create the model with random weights, which are always the same on a device."""
        torch.manual_seed(0)
        with torch.device(self.device):
            return self.auto_class.from_config(
                self.config, attn_implementation="sdpa", dtype=dtype or self.torch_dtype
            )

    def compiled(self, model: nn.Module) -> Callable:
        return torch.compile(model, mode=self.compile) if self.compile else model


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model and what is timed of it.

    Attributes:
        step: does one training step or forward pass.
        trained: the number of trained parameters.
        model: the model; None if it lives in the process of the baseline library.
        peak: the most bytes that a training step takes on a GPU, with the model and the optimizer.
    """

    step: Callable[[], object]
    trained: int
    model: nn.Module | None
    peak: int | None = None


def select(names: Iterable[str], only: Sequence[str]) -> list[str]:
    """Return the `names` that are in `only`, or all if `only` is empty."""
    names = list(names)
    for name in only:
        if name not in names:
            raise ConfigError(f"--only: {name} is not one of {', '.join(names)}")
    return [name for name in names if not only or name in only]


def _add_adapter(base: PreTrainedModel, config: LoraConfig) -> nn.Module:
    """Add the PEFT method of `config`, with LoRA's second factor away from its initial zero."""
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    return model


def add_unipelt(base: PreTrainedModel, fields: dict) -> nn.Module:
    return _add_adapter(base, UniPeltConfig(task_type=task_type(base), **fields))


def _unipelt_makers(options: BenchOptions) -> dict[str, Callable[[], nn.Module]]:
    return {
        name: lambda fields=fields: add_unipelt(options.backbone(), fields)  # type: ignore[misc]
        for name, fields in UNIPELT.items()
    }


def peft_lora(base: PreTrainedModel) -> nn.Module:
    """Add PEFT's LoRA of rank 8 to the query and value projections of every attention."""
    targets = [name for site in find_sites(base)[0] for name in (site.query, site.value)]
    config = LoraConfig(task_type=task_type(base), r=8, lora_alpha=16, target_modules=targets)
    return _add_adapter(base, config)


def lower_bound(base: PreTrainedModel) -> nn.Module:
    """Train the head alone, but let gradients pass through the activations of the whole model."""
    pass_gradients(base)
    for name in head_names(base):
        base.get_submodule(name).float().requires_grad_(True)
    return base


def _merged(options: BenchOptions) -> PreTrainedModel:
    """Write what `scaleup export --kind merged` makes of APL with all gates at 0.5, and load it."""
    cpu = BenchOptions("inference", options.geometry)
    base = cpu.backbone()
    model: Any = add_unipelt(cpu.backbone(), UNIPELT["APL"])
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        work = pathlib.Path(name)
        base.save_pretrained(work / "base")
        model.save_pretrained(str(work / "adapter"))
        config, tensors = fold.read_checkpoint(work / "adapter")
        empty = empty_model(copy.deepcopy(base.config), "sdpa", torch.float32, cpu.auto_class)
        sites = find_sites(empty)
        gates = dict.fromkeys(fold.constant_gates(config, *sites), 0.5)
        folded = fold.fold(config, tensors, *sites, gates)
        out = work / "merged"
        out.mkdir()
        writer = FolderWriter(empty, folded, torch.float32, out)
        writer.write_config(cpu.auto_class.__name__)
        writer.write_weights(work / "base", shard_bytes=10**11)
        return cpu.auto_class.from_pretrained(out, trust_remote_code=True)


def inference_variants(options: BenchOptions, batch: Batch) -> dict[str, Variant]:
    """Make one forward pass: the bare backbone, each method with its gates, and APL merged.

    The prefix has no MLP, because at inference only the keys and values remain of it.
    """
    inputs = {name: tensor.to(options.device) for name, tensor in batch.items() if name != "labels"}
    makers = {"bare": options.backbone} | _unipelt_makers(options)
    del makers["APL, prefix MLP"]
    if options.geometry not in LANGUAGE_MODELS:
        makers["APL merged"] = lambda: _merged(options)

    def variant(model: nn.Module) -> Variant:
        for parameter in model.parameters():  # those read from a file share the file's memory
            parameter.data = parameter.data.to(options.device, options.torch_dtype, copy=True)
        model.to(options.device).eval()
        call = options.compiled(model)

        def step() -> torch.Tensor:
            with torch.inference_mode():
                return call(**inputs).logits

        return Variant(step, 0, model)

    return {name: variant(makers[name]()) for name in select(makers, options.only)}


def training_variant(options: BenchOptions, model: Any, batches: list[Batch]) -> Variant:
    """Do one step of AdamW on each batch."""
    model.to(options.device).train()
    call = options.compiled(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    # The lower bound of a language model trains nothing.
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True) if trained else None
    batches = [
        {name: tensor.to(options.device) for name, tensor in with_labels(batch, model).items()}
        for batch in batches
    ]
    half = options.dtype == "bfloat16"

    def passes(batch: Batch) -> torch.Tensor:
        with torch.autocast(options.device, torch.bfloat16, enabled=half):
            loss = call(**batch).loss
        loss.backward()
        return loss.detach()

    run = StepGraphs(model.parameters(), passes) if options.graphs else passes

    def step() -> None:
        for batch in batches:
            run(batch)
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

    return Variant(step, sum(p.numel() for p in trained), model)


def training_variants(options: BenchOptions, batch: Batch) -> dict[str, Variant]:
    """Do one training step: full fine-tuning, the lower bound, BitFit, LoRA, and each method.

    What is trained is always in float32, so full fine-tuning and BitFit have no half types.
    """
    bitfit = MethodSettings(name="bitfit")
    makers: dict[str, Callable[[], nn.Module]] = {
        "full fine-tuning": lambda: options.backbone(torch.float32),
        "lower-bound": lambda: lower_bound(options.backbone()),
        "BitFit": lambda: apply_method(options.backbone(torch.float32), bitfit),
        "PEFT LoRA": lambda: peft_lora(options.backbone()),
    } | _unipelt_makers(options)
    created = {}
    for name in select(makers, options.only):
        allocated = torch.cuda.memory_allocated() if options.device == "cuda" else None
        variant = training_variant(options, makers[name](), [batch])
        if allocated is not None:
            peak = meter.cuda_peak(variant.step) - allocated
            variant = dataclasses.replace(variant, peak=peak)
        created[name] = variant
    return created


def ragged_variants(options: BenchOptions, lengths: list[int]) -> dict[str, Variant]:
    """Train APL on the same examples with three ways of padding.

    Every batch is padded to `options.length`, or to its longest example, or holds examples of
    similar lengths (`train.group_by_length`) and is padded to the longest.
    """
    count, vocabulary = len(lengths), options.config.vocab_size
    batch_size, width = options.batch, options.length
    grouped = list(ResumableSampler(count, 0, lambda: 0, lengths, batch_size))
    orders: dict[str, tuple[Sequence[int], int | None]] = {
        f"padded to {width}": (range(count), width),
        "padded to the longest": (range(count), None),
        "length groups": (grouped, None),
    }

    def variant(order: Sequence[int], fixed_width: int | None) -> Variant:
        parts = [
            [lengths[i] for i in order[first : first + batch_size]]
            for first in range(0, count, batch_size)
        ]
        batches = [random_batch(part, fixed_width or max(part), vocabulary) for part in parts]
        return training_variant(options, add_unipelt(options.backbone(), FLAT), batches)

    return {name: variant(*order) for name, order in orders.items()}
