"""A GPU that is not there: after `start()`, "cuda" is a device on which nothing is computed.

Real are Triton's dispatcher, its compiled launcher and its kernels, compiled for sm_90; PyTorch's Python bindings,
dispatcher, device guards, TensorIterators and autograd engine with its device thread. Missing are cuBLAS's heuristics,
CUDA's own allocator, for which one of the same build stands, and the driver's launch; `spin` puts times in their place.
"""

import ctypes
import importlib.util
import os
import sys
from types import SimpleNamespace
from typing import Any

from . import build

cuda: Any = None  # libcuda.c
fake: Any = None  # fakecuda.cpp


def start() -> None:
    """Makes the device. PyTorch asks once and for all whether there is a GPU, so it must not have been imported."""
    global cuda, fake
    if fake is not None:
        return
    if "torch" in sys.modules:
        raise RuntimeError("the rig has to start before torch is imported")
    folder = build.libraries()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("ADAPTER_OPS_UNMEASURED", "1")
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    # Whoever opens libcuda.so.1 by that name from now on gets this one.
    cuda = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    torch_libraries = build.package("torch") / "lib"
    ctypes.CDLL(str(torch_libraries / "libtorch_global_deps.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(torch_libraries / "libtorch_python.so"))
    extension = folder / "fakecuda.so"
    ctypes.CDLL(str(extension))  # registers the device
    import torch

    spec = importlib.util.spec_from_file_location("fakecuda", extension)
    assert spec is not None and spec.loader is not None
    fake = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fake)
    _claim(torch)


def _claim(torch: Any) -> None:
    """Answers what PyTorch's Python code asks of a CUDA device."""
    for name in ("_cuda_getDevice", "_cuda_getCurrentRawStream", "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice"):
        setattr(torch._C, name, getattr(fake, name))
    properties = SimpleNamespace(
        name="a rig of sm_90", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20, warp_size=32
    )
    torch.version.cuda = "13.0"
    torch.cuda._initialized = True
    for name, answer in {
        "is_available": True,
        "is_bf16_supported": True,
        "device_count": 2,
        "synchronize": None,
        "get_device_capability": (9, 0),
        "get_device_name": properties.name,
        "get_device_properties": properties,
    }.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    # Two functions, since torch.compile tells them apart.
    torch.cuda._exchange_device = lambda device: fake._cuda_exchangeDevice(device)
    torch.cuda._maybe_exchange_device = lambda device: fake._cuda_maybeExchangeDevice(device)


def allow_compile() -> None:
    """Answers what torch.compile asks beyond that. Its kernels go through Triton's own launcher, as the one that
    PyTorch has for them is not in a CPU build."""
    import torch
    from torch._C._dynamo import guards
    from torch._inductor import config
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    torch.cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = lambda *_: None
    torch._C._cuda_setDevice = lambda device: None
    guards._empty_strided_cuda = fake._empty_strided_cuda  # type: ignore[attr-defined]
    config.use_static_triton_launcher = False
    config.compile_threads = 1  # other processes have no rig
    # Nothing is faster than anything else here: the first of several configs is taken.
    tuner: Any = CachingAutotuner
    tuner.benchmark_all_configs = lambda self, *_, **__: {k: i for i, k in enumerate(self.launchers)}


def spin(launch_us: float = 0, gemm_us: float = 0) -> None:
    """Time that each launch, Triton's and PyTorch's, and each product of PyTorch's takes beside its host code."""
    ctypes.c_long.in_dll(cuda, "rig_launch_ns").value = round(launch_us * 1e3)
    fake.spin(round(launch_us * 1e3), round(gemm_us * 1e3))
