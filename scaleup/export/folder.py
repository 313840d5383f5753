"""Writing a transformers folder that carries UniPELT: its modelling code, its config, and weights streamed from the backbone's files.

The modelling code is scaleup/standalone.py with the definitions of scaleup that it reaches, and no others, in one file.
"""

import ast
import importlib.util
import json
import pathlib

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scaleup.backbone.sharded import Weights, return_freed_memory
from scaleup.export.fold import Folded

CODE = "modeling_unipelt"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

HEAD = '''"""{model} with UniPELT, exported by scaleup {version}. Needs torch and transformers.

The definitions down to {own} are those of scaleup that this model uses, word for word.
"""

from __future__ import annotations

'''
TAIL = """

register_attention()


class {config}(transformers.{config}):
    model_type = "{model_type}"


class {model}(transformers.{model}):
    config_class = {config}
{strict}
    def __init__(self, config: {config}):
        super().__init__(config)
        attach_exported(self, config.unipelt, {tokens_of}, {gate_of})
"""


def _bound(node: ast.stmt) -> list[str]:
    """Names that a top-level statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return [
        name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)
    ]


class _WithoutTypes(ast.NodeTransformer):
    """Annotations are not evaluated in the folder's code, so what only they name is not needed."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)


def _sources(name: str, found: dict[str, str]) -> dict[str, str]:
    """Text of the module and of those of scaleup that it imports, in the order in which they import each other."""
    text = pathlib.Path(importlib.util.find_spec(f"scaleup.{name}").origin).read_text(
        encoding="utf-8"
    )
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "scaleup":
            for other in (
                [alias.name for alias in node.names]
                if node.module == "scaleup"
                else [node.module.split(".")[1]]
            ):
                if other not in found:
                    _sources(other, found)
    found[name] = text
    return found


def _names(node: ast.stmt) -> set[str]:
    plain = _WithoutTypes().visit(ast.parse(ast.unparse(node)))
    return {name.id for name in ast.walk(plain) if isinstance(name, ast.Name)}


def _source(lines: list[str], node: ast.stmt) -> str:
    """With its decorators and the comment right above it."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    while first and lines[first - 1].startswith("#"):
        first -= 1
    return "\n".join(lines[first : node.end_lineno])


def modelling_code(model: PreTrainedModel, learned: bool, version: str) -> str:
    """Source of the folder's one Python file: classes with the names of the model's own and of its config's."""
    names = {
        "tokens_of": "_tokens" if learned else "all_real",
        "gate_of": "learned_gate" if learned else "constant_gate",
    }
    defined: dict[str, tuple[int, int, ast.stmt, list[str]]] = {}
    imports: dict[str, str] = {}
    homes: dict[str, set[str]] = {}
    for rank, (module, text) in enumerate(_sources("standalone", {}).items()):
        for node in ast.parse(text).body:
            if isinstance(node, ast.Import | ast.ImportFrom) and not (
                getattr(node, "module", None) or ""
            ).startswith("scaleup"):
                for alias in node.names:
                    origin = (
                        f"from {node.module} import"
                        if isinstance(node, ast.ImportFrom)
                        else "import"
                    )
                    imports[alias.asname or alias.name.split(".")[0]] = f"{origin} {alias.name}" + (
                        f" as {alias.asname}" if alias.asname else ""
                    )
            for found in _bound(node):
                # A replacement stands where the first definition stood, before what is built on it.
                place = defined[found][:2] if found in defined else (rank, node.lineno)
                defined[found] = (*place, node, text.splitlines())
                homes.setdefault(found, set()).add(module)
    wanted, seen = ["attach_exported", "register_attention", *names.values()], set()
    while wanted:
        name = wanted.pop()
        if name in defined and name not in seen:
            seen.add(name)
            wanted += _names(defined[name][2])
    twice = [name for name in seen if len(homes[name] - {"standalone"}) > 1]
    assert not twice, f"two modules define {twice}, and the folder has one file: rename one"
    chosen = {id(defined[name][2]): defined[name] for name in seen}.values()
    parts = sorted(chosen, key=lambda entry: entry[:2])
    used = set().union(*(_names(node) for _, _, node, _ in parts))
    lines = sorted(
        {imports[name] for name in used if name in imports} | {"import transformers"},
        key=lambda line: (line.startswith("from"), line),
    )
    about = {
        "model": type(model).__name__,
        "config": type(model.config).__name__,
        "model_type": exported_type(model.config.model_type),
        "version": version,
    }
    strict = (
        '    _keep_in_fp32_modules_strict = ["unipelt"]  # gates are means over many tokens\n'
        if learned
        else ""
    )
    body = "\n\n\n".join(_source(text, node) for _, _, node, text in parts)
    return (
        HEAD.format(own=about["config"], **about)
        + "\n".join(lines)
        + "\n\n\n"
        + body
        + "\n"
        + TAIL.format(strict=strict, **about, **names)
    )


def exported_type(model_type: str) -> str:
    """A name that transformers does not know: with a known one, loading without `trust_remote_code` would silently give the bare
    backbone."""
    return f"unipelt_{model_type}"


def write_config(
    model: PreTrainedModel,
    auto: str,
    folded: Folded,
    learned: bool,
    dtype: torch.dtype,
    folder: pathlib.Path,
    version: str,
) -> None:
    """config.json, and the modelling code if there is anything beyond plain weights."""
    values = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": str(dtype).removeprefix("torch."),
    }
    for private in [key for key in values if key.startswith("_") or key == "quantization_config"]:
        del values[private]
    if folded.spec is not None:
        classes = {
            "AutoConfig": type(model.config).__name__,
            "AutoModel": type(model).__name__,
            auto: type(model).__name__,
        }
        values |= {
            "model_type": exported_type(model.config.model_type),
            "auto_map": {key: f"{CODE}.{name}" for key, name in classes.items()},
            "unipelt": folded.spec,
        }
        (folder / f"{CODE}.py").write_text(
            modelling_code(model, learned, version), encoding="utf-8"
        )
    (folder / "config.json").write_text(
        json.dumps(values, indent=1, sort_keys=True) + "\n", encoding="utf-8"
    )


def _new_name(name: str, renamed: dict[str, str]) -> str:
    module, _, parameter = name.rpartition(".")
    return f"{renamed.get(module, module)}.{parameter}" if module else parameter


def write_weights(
    model: PreTrainedModel,
    files: pathlib.Path,
    folded: Folded,
    dtype: torch.dtype,
    additions: torch.dtype,
    folder: pathlib.Path,
    shard_bytes: int,
) -> int:
    """The backbone's tensors as `dtype`, updated, and what is added as `additions`, in shards of at most `shard_bytes` (or one tensor).

    `model`: an empty one. Only one shard is in memory at a time. Returns the bytes written. Raises ValueError for a backbone
    that lacks a tensor which the bundle has not.
    """
    names_of: dict[int, list[str]] = {}  # tied weights are written once
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | buffers
    for name, tensor in tensors.items():
        names_of.setdefault(id(tensor), []).append(name)
    jobs: list[tuple[str, int]] = [
        (names[0], tensors[names[0]].numel() * dtype.itemsize) for names in names_of.values()
    ]
    extra = [name for name in folded.tensors if name not in tensors]
    jobs += [(name, folded.tensors[name].numel() * additions.itemsize) for name in extra]
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in jobs:
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    conv = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    index, total = {}, 0
    for number, shard in enumerate(shards):
        file = (
            WEIGHTS
            if len(shards) == 1
            else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        )
        content, source = (
            {},
            Weights(model, files),
        )  # opened anew: pages of a mapped file stay in memory until it is closed
        for name in shard:
            aliases = names_of[id(tensors[name])] if name in tensors else [name]
            tensor = _tensor(name, aliases, source, folded, conv, name in extra)
            if tensor is None and name in buffers:
                continue  # made anew with the model
            if tensor is None:
                raise ValueError(
                    f"{files} has no {name}, and neither has the checkpoint; it is not the backbone that was trained on"
                )
            kind = additions if name in extra else dtype
            content[_new_name(name, folded.renamed)] = (
                tensor.to(kind).contiguous() if tensor.is_floating_point() else tensor.contiguous()
            )
        save_file(content, str(folder / file), metadata={"format": "pt"})
        index |= dict.fromkeys(content, file)
        total += sum(t.numel() * t.itemsize for t in content.values())
        del content, source, tensor
        return_freed_memory()
    if len(shards) > 1:
        (folder / INDEX).write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1) + "\n",
            encoding="utf-8",
        )
    return total


def _tensor(
    name: str, aliases: list[str], source: Weights, folded: Folded, conv: set[str], is_new: bool
) -> torch.Tensor | None:
    if is_new:
        return folded.tensors[name]
    own = next(
        (folded.tensors[alias] for alias in aliases if alias in folded.tensors), None
    )  # a trained head
    tensor = own if own is not None else source.get(aliases)
    update = folded.updates.get(name)
    if tensor is None or update is None:
        return tensor
    delta_OI = update()
    return tensor.float() + (delta_OI.t() if name.rpartition(".")[0] in conv else delta_OI)
