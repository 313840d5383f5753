"""Convert a checkpoint of the library adapters (AdapterHub) to an adapter checkpoint of scaleup.

    scaleup import-adapters DIR --output OUT
    scaleup import-adapters DIR --output OUT --model models/bert-base

DIR is a folder that `save_adapter` of adapters 1.1 to 1.3 has written, with UniPELT, LoRA,
prefix-tuning, a bottleneck adapter or a combination of them, for BERT, RoBERTa, BART or T5. OUT
gives the same logits; backbone_config.json in it has the class names of the head. What scaleup
cannot represent exactly is refused, with the reasons.

Exit codes: 0 done; 2 the checkpoint cannot be converted, or an argument must change; 130
interrupted.
"""

import argparse
import os
from pathlib import Path

from scaleup.cli.exit_codes import DONE


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="folder with adapter_config.json")
    output = "folder to write, which must not exist"
    add("--output", type=Path, required=True, metavar="OUT", help=output)
    model = "folder or hub id of the backbone (default: the one that the checkpoint names)"
    add("--model", metavar="NAME", help=model)
    attention = "attention that the adapter was trained with; matters for BART with a prefix"
    add("--attention", choices=("eager", "sdpa"), help=attention)


def run(options: argparse.Namespace) -> int:
    """Convert, and print the lines that load the result. Returns the exit code."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would guess, and warn
    from scaleup.export.adapterhub.convert import import_adapter

    imported = import_adapter(options.folder, options.output, options.model, options.attention)
    output, auto, labels = imported.output, imported.auto, imported.labels
    print(f"submodules: {', '.join(imported.config.submodules)}; gates: {imported.config.gates}")
    if labels is not None:
        print(f"labels: {', '.join(labels)}")
    print("load it with")
    print("    import scaleup")
    print("    from peft import PeftModel")
    if labels is None:
        print(f"    from transformers import {auto}")
        print(f'    base = {auto}.from_pretrained("{imported.backbone}")')
    else:
        print(f"    from transformers import AutoConfig, {auto}")
        print(f'    config = AutoConfig.from_pretrained("{output}/backbone_config.json")')
        print(f'    base = {auto}.from_pretrained("{imported.backbone}", config=config)')
    print(f'    model = PeftModel.from_pretrained(base, "{output}")')
    return DONE
