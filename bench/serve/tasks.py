"""Tasks that differ from one another, texts, and the answer that each task gives each text alone."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adapter_ops import AdapterConfig, add_adapter, delete_adapter, save_adapter, using_adapter

LABELS = 4
TOLERANCE = 2e-5  # of a score: fp32 in batches of other sizes and lengths
LENGTH = 128  # characters of a text at most


class World(NamedTuple):
    """What is asked, and what has to be answered."""

    model: str  # folder or hub name of the base
    folder: Path  # of the tasks' folders
    texts: list[str]
    scores: dict[str, list[list[float]]]  # by task, for each text those of all labels
    lengths: list[int]  # of the texts, in tokens

    def right(self, task: str, text: int, answer: dict[str, Any]) -> bool:
        """Whether an answer has the scores of this task for this text, and the label that follows from them."""
        expected, found = self.scores[task][text], list(answer["scores"].values())
        close = len(found) == LABELS and all(abs(a - b) <= TOLERANCE for a, b in zip(found, expected))
        return close and answer["label"] == max(answer["scores"], key=answer["scores"].__getitem__)


def make(model: str, folder: Path, tasks: int, texts: int, bottleneck: int) -> World:
    """Saves tasks with random weights, adapters as large as trained ones have them, and computes their answers.

    Raises RuntimeError if the model cannot be loaded, or if two of the tasks answer a text so much alike that a mistake
    between them could pass.
    """
    try:
        base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=LABELS).eval()
        tokenizer = AutoTokenizer.from_pretrained(model)
    except Exception as error:  # which one depends on what is wrong with the files
        raise RuntimeError(f"the model {model!r} cannot be loaded ({type(error).__name__}: {error})") from error
    asked = sentences(texts)
    encoded = [tokenizer(text, return_tensors="pt") for text in asked]
    scores = {}
    for number in range(tasks):
        name = f"task{number}"
        torch.manual_seed(number)
        add_adapter(base, name, AdapterConfig(bottleneck=bottleneck))
        disturb(base)
        save_adapter(base, folder / name, name)
        with torch.inference_mode(), using_adapter(base, name):
            scores[name] = [base(**inputs).logits[0].double().softmax(0).tolist() for inputs in encoded]
        delete_adapter(base, name)
    check_different(scores)
    return World(model, folder, asked, scores, [inputs["input_ids"].shape[1] for inputs in encoded])


def sentences(count: int) -> list[str]:
    """Different texts: what Python says of the methods of its own types."""
    kinds = (str, dict, list, set, int, float, bytes, tuple, complex, slice)
    docs = (vars(kind)[name].__doc__ for kind in kinds for name in sorted(vars(kind)) if not name.startswith("_"))
    found = list(dict.fromkeys(" ".join(doc.split())[:LENGTH] for doc in docs if doc))
    if len(found) < count:
        raise RuntimeError(f"there are {len(found)} different texts, and {count} were asked for")
    return found[:: len(found) // count][:count]


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    """Noise on everything that trains: a new adapter hardly changes anything."""
    for p in model.parameters():
        if p.requires_grad:
            matrix = 0.3 if p.shape[0] == LABELS else 0.05  # of a head, so that its scores are far from even; or not
            p.add_(torch.randn_like(p), alpha=matrix if p.dim() > 1 else 0.02)


def check_different(scores: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """Raises RuntimeError if two tasks agree on a text within ten times the tolerance."""
    for (one, first), (other, second) in itertools.combinations(scores.items(), 2):
        for number, (a, b) in enumerate(zip(first, second)):
            if max(abs(x - y) for x, y in zip(a, b)) < 10 * TOLERANCE:
                raise RuntimeError(f"{one} and {other} give text {number} the same scores: take another seed")


def quiet() -> None:
    """Keeps transformers from reporting heads that are new, which every task replaces."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=UserWarning)
