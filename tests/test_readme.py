"""The code in the documentation runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from helpers_models import TEXT

ROOT = Path(__file__).parent.parent


def blocks():
    for name in ("README.md", "adapter_ops/README.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text[: match.start()].count("\n") + 1
            yield pytest.param(match[1], id=f"{name}:{line}")


BLOCKS = list(blocks())


def small(*_, **fields):
    """A model like the one that an example downloads, with the same weights every time."""
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig(**TEXT | fields))


@pytest.mark.usefixtures("aten")
@pytest.mark.parametrize("code", BLOCKS)
def test_a_block_of_code(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf.AutoModelForSequenceClassification, "from_pretrained", small)
    exec(compile(code, "README", "exec"), {"__name__": "readme"})


def test_the_blocks_are_found_and_the_readme_is_short():
    assert len(BLOCKS) >= 6
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
