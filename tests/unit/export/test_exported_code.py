"""The modelling code of an export opens no file or connection and executes no text."""

import ast

import pytest

from scaleup.export.folder import CODE, MODELLING_CODE, modelling_files

# Modules that the code may import, besides the other files of the folder.
ALLOWED = {
    "collections",
    "contextlib",
    "dataclasses",
    "functools",
    "hashlib",
    "math",
    "operator",
    "peft",  # its classes, where it is installed
    "torch",
    "transformers",
    "triton",
    "types",
    "typing",
    "weakref",
}
# Modules of which the code may use these functions only: module → names.
IN_PART = {
    "sys": {"modules"},
    "inspect": {"signature"},
    "threading": {"local"},
    "os": {"environ"},  # SCALEUP_KERNELS
}
# Names of functions and attributes that read or write files, connect, or execute text or pickles.
FORBIDDEN = {
    *("open", "eval", "exec", "compile", "__import__", "input", "breakpoint", "globals", "vars"),
    *("import_module", "system", "popen", "Popen", "spawn", "connect", "urlopen", "socket"),
    *("load", "loads", "load_file", "safe_open", "save", "dump", "save_file", "fromfile", "memmap"),
    *("read_text", "read_bytes", "write_text", "write_bytes", "unlink", "remove", "rename"),
    *("hub", "torch_load", "from_file", "package", "cpp_extension", "load_inline", "load_library"),
    *("from_pretrained", "save_pretrained", "push_to_hub", "download", "snapshot_download"),
    *("__globals__", "__builtins__", "__subclasses__", "__code__", "__loader__", "__reduce__"),
    *("os", "subprocess", "pickle", "builtins", "ctypes", "pathlib", "shutil", "requests"),
}


def sources() -> dict[str, str]:
    """Return the text of every Python file of an export, by name."""
    files = {name: path.read_text(encoding="utf-8") for name, path in modelling_files().items()}
    values = {"model": "BertModel", "config": "BertConfig", "version": "0", "strict": ""}
    return files | {f"{CODE}.py": MODELLING_CODE.format(model_type="unipelt_bert", **values)}


def imports_tl(tree: ast.Module) -> bool:
    """Return whether the name `tl` can only be triton.language, whose `load` reads GPU memory."""
    origins = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            origins |= {
                (module, alias.name) for alias in node.names if "tl" in (alias.name, alias.asname)
            }
        elif (
            isinstance(node, ast.Name) and node.id == "tl" and isinstance(node.ctx, ast.Store)
        ) or (isinstance(node, ast.arg) and node.arg == "tl"):
            return False
    return bool(origins) and origins <= {(None, "triton.language"), ("triton_launch", "tl")}


def problems(text: str) -> list[str]:
    """Return what a file uses that an export may not use."""
    found = []
    tree = ast.parse(text)
    loads_of_tl = {
        id(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "load" and imports_tl(tree)
        if isinstance(node.value, ast.Name) and node.value.id == "tl"
    }
    allowed_uses = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if node.attr in IN_PART.get(node.value.id, ())
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""] if node.level == 0 else []
            names = [alias.name for alias in node.names]
        else:
            modules = []
        if isinstance(node, ast.Name):
            names = [] if node.id in IN_PART else [node.id]
            if node.id in IN_PART and id(node) not in allowed_uses:
                found.append(f"line {node.lineno} uses {node.id} for more than it may")
        elif isinstance(node, ast.Attribute):
            names = [] if id(node) in loads_of_tl else [node.attr]
        elif isinstance(node, ast.Constant):  # also the names that getattr takes as text
            names = [str(node.value)]
        for module in modules:
            parts = module.split(".")
            is_part = (
                isinstance(node, ast.Import) and module in IN_PART and not node.names[0].asname
            )
            if parts[0] not in ALLOWED and not is_part:
                found.append(f"line {node.lineno} imports {module}")
            names += parts[1:]
        found += [f"line {node.lineno} uses {name}" for name in names if name in FORBIDDEN]
    return found


@pytest.mark.parametrize("name", sources())
def test_exported_code_opens_nothing_and_executes_no_text(name):
    assert problems(sources()[name]) == []


@pytest.mark.parametrize(
    "text",
    [
        "open('x')",
        "import os\nos.getcwd()",
        "import os as o",
        "import importlib",
        "from os import path",
        "import torch.hub",
        "from torch import hub",
        "import socket as s",
        "import sys as s",
        "from sys import modules",
        "import sys\nsys.stdout",
        "import sys\nuse(sys)",
        "import inspect\ninspect.getsource(f)",
        "import threading\nthreading.Thread(target=f)",
        "eval('1')",
        "compile('1', '', 'eval')",
        "__import__('os')",
        "torch.load('x')",
        "getattr(torch, 'load')",
        "tl.load('x')",
        "import torch as tl\ntl.load('x')",
        "import triton.language as tl\ntl = torch\ntl.load('x')",
        "from .triton_launch import tl\ntorch.load('x')",
        "torch.utils.cpp_extension",
        "().__class__.__base__.__subclasses__()",
        "from transformers import AutoModel as A\nA.from_pretrained('x')",
    ],
)
def test_the_walk_finds_what_an_export_may_not_use(text):
    assert problems(text)
