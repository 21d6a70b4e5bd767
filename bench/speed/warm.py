"""Compiling ahead, in many processes: what Triton and Inductor compile they keep on disk, where the run then finds it.

On a GPU, compiling is most of what a benchmark of many shapes would wait for, and one process does little of it at a
time.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
import torch._inductor.config
from tqdm import tqdm

from ..shape import Shape
from .cases import PROVIDERS, Case

# In a worker: no workers of its own, and no choice between configs kept that was made on a crowded GPU.
WORKER = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}


def warm(
    shapes: Sequence[Shape], dtypes: Sequence[torch.dtype], providers: Sequence[str], device: str, processes: int
) -> None:
    """Runs each provider once, forward and training, but for max-autotune: its trials want the GPU for themselves."""
    by_weights: dict[tuple[int, int], list[Shape]] = {}  # our kernels, unlike Inductor's, are the same for every M
    for shape in shapes:
        by_weights.setdefault((shape.D, shape.R), []).append(shape)
    groups = {"adapter_ops": list(by_weights.values()), "compile": [[shape] for shape in shapes]}
    jobs = [(g, dtype, n, device) for n in groups if n in providers for dtype in dtypes for g in groups[n]]
    before = dict(os.environ)
    os.environ.update(WORKER)
    try:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            done = [pool.submit(compile_all, *job) for job in jobs]
            for _ in tqdm(as_completed(done), total=len(jobs), unit="job", desc="compiling", disable=None):
                pass
    finally:
        os.environ.clear()
        os.environ.update(before)


def compile_all(shapes: Sequence[Shape], dtype: torch.dtype, name: str, device: str) -> None:
    torch._inductor.config.autotune_local_cache = False
    for shape in shapes:
        torch.compiler.reset()
        with contextlib.suppress(Exception):  # out of memory beside the others, say: then the run compiles it
            case = Case(shape, dtype, device)
            module = case.make(name)
            for mode in PROVIDERS[name].modes:
                case.call(module, mode)()
    if device == "cuda":
        torch.cuda.empty_cache()
