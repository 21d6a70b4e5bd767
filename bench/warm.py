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

from .cases import PROVIDERS, Case, Shape

# In a worker: no workers of its own, and no choice between configs kept that was made on a crowded GPU.
WORKER = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}


def warm(
    shapes: Sequence[Shape], dtypes: Sequence[torch.dtype], providers: Sequence[str], device: str, processes: int
) -> None:
    """Runs each provider once, forward and training, but for max-autotune: its trials want the GPU for themselves."""
    names = [name for name in providers if name in ("compile", "adapter_ops")]
    jobs = [(shape, dtype, name, device) for name in names for dtype in dtypes for shape in shapes]
    before = dict(os.environ)
    os.environ.update(WORKER)
    try:
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
            done = [pool.submit(compile_one, *job) for job in jobs]
            for _ in tqdm(as_completed(done), total=len(jobs), unit="case", desc="compiling", disable=None):
                pass
    finally:
        os.environ.clear()
        os.environ.update(before)


def compile_one(shape: Shape, dtype: torch.dtype, name: str, device: str) -> None:
    torch.compiler.reset()
    torch._inductor.config.autotune_local_cache = False
    with contextlib.suppress(Exception):  # out of memory beside the others, say: then the run compiles it
        case = Case(shape, dtype, device)
        module = case.make(name)
        assert module is not None
        for mode in PROVIDERS[name].modes:
            case.call(module, mode)()
    if device == "cuda":
        torch.cuda.empty_cache()
