"""Let one process of each host talk to the hub, instead of all of them at the same time."""

import pathlib
from typing import Any

from huggingface_hub import constants

from scaleup.backbone import loading as backbone
from scaleup.backbone.tokenizer import load_tokenizer
from scaleup.errors import ConfigError
from scaleup.settings.schema import ModelSettings
from scaleup.training import distributed
from scaleup.training.distributed import World


def download_once(model: ModelSettings, auto: Any, world: World) -> None:
    """Download a backbone of the hub on the first process of each host, and wait for it.

    The other processes then only use the cache of their host.

    Args:
        auto: transformers' AutoModelFor… class of the task.

    Raises:
        ConfigError: on every process, if a host cannot download it.
    """
    if world.size == 1 or pathlib.Path(model.name).is_dir():
        return
    problem = None
    if world.local_main:
        try:
            config = backbone.load_config(model)
            load_tokenizer(model, config, auto)
            backbone.download(model)
        except ConfigError as error:
            problem = error
    distributed.wait_for_all(world)
    for found in filter(None, distributed.gather(world, problem)):
        raise found
    if not world.local_main:
        constants.HF_HUB_OFFLINE = True
