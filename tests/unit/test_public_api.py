"""The package's names: lazy, registered with PEFT in either order of imports, one version."""

import importlib
import importlib.metadata
import pathlib
import re
import subprocess
import sys

import pytest

import scaleup
from tests.utils.workspace import ROOT, environment

KNOWN = (
    "from peft import PeftType\n"
    "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs, PEFT_TYPE_TO_TUNER_MAPPING\n"
    "assert PEFT_TYPE_TO_TUNER_MAPPING['UNIPELT'].__name__ == 'UniPeltModel'\n"
)


def python(script: str, cwd: pathlib.Path = ROOT) -> str:
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    result = subprocess.run(
        [sys.executable, "-c", path + script],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=environment(),
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_imports_no_library():
    python(
        "import scaleup\n"
        "assert not {'torch', 'transformers', 'peft', 'pydantic'} & sys.modules.keys()\n"
        "assert {'train', 'UniPeltConfig'} <= set(dir(scaleup))\n"
        "assert 'peft' not in sys.modules\n"
    )


ORDERS_OF_IMPORTS = [
    "import scaleup, peft",
    "import peft, scaleup",
    "import scaleup; from transformers import Trainer",
    "import scaleup; import transformers.trainer_utils",
    "import scaleup.settings.schema",
    "import scaleup.unipelt.sites",
    "import scaleup; import peft.tuners.lora",
    "import scaleup; scaleup.UniPeltConfig()",
    # transformers looks for PEFT in this way before it imports it.
    "import importlib.util, scaleup; assert importlib.util.find_spec('peft').origin;"
    "assert 'peft' not in sys.modules; import peft",
    "import importlib, scaleup, peft; importlib.reload(peft)",
    "import importlib, scaleup; importlib.reload(scaleup); import peft",
    "import threading, scaleup\n"
    "def work():\n    import peft\n    from peft import PeftModel\n"
    "threads = [threading.Thread(target=work) for _ in range(4)]\n"
    "for t in threads: t.start()\n"
    "for t in threads: t.join()",
]

# One process imports what all orders have in common, and each order runs in a fork of it.
IN_FORKS = """
import os, sys, traceback
import accelerate, bitsandbytes, sklearn.metrics, torch, transformers.modeling_utils
assert not {'scaleup', 'peft'} & sys.modules.keys()
for script in SCRIPTS:
    child = os.fork()
    if not child:
        try:
            exec(script, {"sys": sys})
        except BaseException:
            print(script, file=sys.stderr)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(1)
    print('right')
"""


def test_peft_knows_the_method_in_every_order_of_imports():
    scripts = [f"{imports}\n{KNOWN}" for imports in ORDERS_OF_IMPORTS]
    output = python(f"SCRIPTS = {scripts!r}\n{IN_FORKS}")
    assert output.split() == ["right"] * len(scripts)


@pytest.mark.parametrize("imports", ["import scaleup\nimport peft", "import peft\nimport scaleup"])
def test_a_saved_adapter_loads_and_survives_pickling(tmp_path, imports):
    script = f"""
{imports}
import pickle, torch
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig
from transformers import BertForSequenceClassification

small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
BertForSequenceClassification(BertConfig(vocab_size=20, **small)).save_pretrained("backbone")
backbone = lambda: AutoModelForSequenceClassification.from_pretrained("backbone")
model = get_peft_model(backbone(), scaleup.UniPeltConfig(prefix_hidden_size=4)).eval()
model.save_pretrained("adapter")
inputs = dict(input_ids=torch.tensor([[1, 2, 3]]), attention_mask=torch.ones(1, 3, dtype=int))
expected = model(**inputs).logits
for loaded in (
    PeftModel.from_pretrained(backbone(), "adapter"),
    AutoPeftModelForSequenceClassification.from_pretrained("adapter"),
    pickle.loads(pickle.dumps(model)),
):
    assert torch.allclose(loaded.eval()(**inputs).logits, expected, atol=1e-6)
"""
    python(script, tmp_path)


def test_every_public_name_can_be_used():
    # An import of the subpackage must not hide the function.
    importlib.import_module("scaleup.export.export")
    for name in set(scaleup.__all__) - {"__version__"}:
        assert callable(getattr(scaleup, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = scaleup.nothing


def test_a_config_is_loaded_by_the_public_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings = scaleup.load_config(None, ["data.name=rte", "train.seed=7"])
    assert settings.train.seed == 7


def test_there_is_one_version_number():
    assert re.fullmatch(r"\d+\.\d+\.\d+", scaleup.__version__)
    literal = re.escape(f'"{scaleup.__version__}"')
    files = [ROOT / "pyproject.toml", *(ROOT / "scaleup").rglob("*.py")]
    holders = [path for path in files if re.search(literal, path.read_text(encoding="utf-8"))]
    assert holders == [ROOT / "scaleup" / "__init__.py"]
    try:
        installed = importlib.metadata.version("scaleup")
    except importlib.metadata.PackageNotFoundError:
        return
    assert installed == scaleup.__version__
