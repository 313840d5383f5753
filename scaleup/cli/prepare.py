"""Read, check and tokenise the data of a run once, before it starts.

    scaleup prepare --config configs/llama_8b.yaml

The result is in data.cache_dir. A run with the same data, tokenizer and settings finds it there,
and its processes share one copy in memory. A run that finds nothing does the same work itself, on
one process per file system.

Exit codes: 0 done; 1 the result could not be written; 2 the config or the data must change (one
message lists everything); 130 interrupted.
"""

import argparse
import time

from scaleup.cli.config import add_config_arguments, load_settings
from scaleup.cli.exit_codes import DONE


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    add_config_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Prepare the data. Returns the exit code."""
    begin = time.perf_counter()
    settings = load_settings(options, writes=False)
    from scaleup.backbone.lengths import fit_length
    from scaleup.backbone.loading import load_config
    from scaleup.data.prepared import cache_dir
    from scaleup.training.preparation import prepare

    config = load_config(settings.model)
    settings = fit_length(settings, config)
    examples, _ = prepare(settings, config)
    test = 0 if examples.test is None else len(examples.test)
    print(f"train {len(examples.train)}, dev {len(examples.dev)}, test {test} examples")
    print(f"{cache_dir(settings.data)}: prepared in {time.perf_counter() - begin:.1f} s")
    return DONE
