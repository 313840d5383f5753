"""Read, check and tokenise the data of a run once, before it starts.

    scaleup prepare --config configs/llama_8b.yaml

    scaleup prepare --config configs/llama_8b.yaml --fetch DIR    # for offline nodes

The result is in data.cache_dir. A run with the same data, tokenizer and settings finds it there,
and its processes share one copy in memory. A run that finds nothing does the same work itself, on
one process per file system.

--fetch also downloads the model, its tokenizer and data of the hub. DIR becomes a cache of the
Hugging Face libraries, which every program uses whose environment has HF_HOME=DIR. With
HF_HUB_OFFLINE=1 they do not try to reach the hub.

Exit codes: 0 done; 1 the result could not be written; 2 the config or the data must change (one
message lists everything); 130 interrupted.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from scaleup.cli.config import add_config_arguments, load_settings
from scaleup.cli.exit_codes import DONE


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add_config_arguments(parser)
    fetch = "folder to download model, tokenizer and data into; what is there already stays"
    parser.add_argument("--fetch", type=Path, metavar="DIR", help=fetch)


def _use_cache(folder: Path) -> None:
    """Let the Hugging Face libraries, which read their environment once, use another cache."""
    assert "huggingface_hub" not in sys.modules
    home = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    home = os.path.expanduser(os.environ.get("HF_HOME", home))
    os.environ.setdefault("HF_TOKEN_PATH", os.path.join(home, "token"))  # the user's login
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HUB_OFFLINE"):
        os.environ.pop(name, None)
    os.environ["HF_HOME"] = str(folder.expanduser().absolute())


def run(options: argparse.Namespace) -> int:
    """Prepare the data. Returns the exit code."""
    begin = time.perf_counter()
    if options.fetch is not None:
        _use_cache(options.fetch)
    settings = load_settings(options, writes=False)
    from scaleup.backbone.lengths import fit_length
    from scaleup.backbone.loading import download, load_config
    from scaleup.data import streaming
    from scaleup.data.prepared import cache_dir
    from scaleup.training.preparation import prepare

    config = load_config(settings.model)
    settings = fit_length(settings, config)
    examples, _ = prepare(settings, config)
    train = f"{examples.train_rows}"
    if settings.data.streaming:
        train = f"{streaming.check(settings.data, examples.sources)} (checked, not stored)"
    print(f"train {train}, dev {examples.count('dev')}, test {examples.count('test')} examples")
    print(f"{cache_dir(settings.data)}: prepared in {time.perf_counter() - begin:.1f} s")
    if options.fetch is not None:
        print(f"{download(settings.model)}: weights of {settings.model.name}")
        home = os.environ["HF_HOME"]
        print(f"without internet access: HF_HOME={home} HF_HUB_OFFLINE=1 scaleup train …")
    return DONE
