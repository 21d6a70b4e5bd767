"""Replayed launches step aside for Triton's dispatcher where something has changed; on the rig, which needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.host import build

ROOT = Path(__file__).parents[2]

SETUP = """
from bench.host import rig
rig.start()
import sys, threading, torch
from triton import knobs
from adapter_ops import BottleneckAdapter, bottleneck_adapter, explain, ops
from adapter_ops.kernels import replay, split
from adapter_ops.kernels.replay import dispatching

def adapter(D=64, R=16, **options):
    return BottleneckAdapter(D, R, dtype=torch.bfloat16, device="meta", **options).to_empty(device="cuda")

def rows(M=32, D=64, **options):
    return torch.empty(M, D, dtype=torch.bfloat16, device="cuda", **options)

def dispatched(call):
    "How many launches of a call go through Triton's dispatcher."
    found, run = [], split.shrink_kernel.__class__.run
    def counted(kernel, *args, **options):
        found.append(kernel.__name__)
        return run(kernel, *args, **options)
    split.shrink_kernel.__class__.run = counted
    try:
        call()
    finally:
        split.shrink_kernel.__class__.run = run
    return len(found)

def step(a, x):
    return lambda: torch.autograd.grad(a(x), [x, *a.parameters()], torch.empty_like(x))

a, x = adapter(), rows(requires_grad=True)
call = step(a, x)
"""

RECORDED = """
counts = [dispatched(call) for _ in range(4)]
assert counts == [5, 5, 0, 0], counts  # a size that comes once is not recorded
"""

CHANGES = {
    "launch hooks": """
seen = []
hook = lambda metadata: seen.append(metadata.get()["name"])
for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
    chain.add(hook)
    assert dispatched(call) == 5 and len(seen) == 5, seen
    chain.remove(hook)
    seen.clear()
    assert dispatched(call) == 0 and not seen
""",
    "pre-run hooks": """
seen = []
split.expand_kernel.add_pre_run_hook(lambda *args, **options: seen.append(1))
assert dispatched(call) == 2 and len(seen) == 1  # the plan of forward
split.expand_kernel.pre_run_hooks = [lambda *args, **options: seen.append(2)]
assert dispatched(call) == 2 and seen == [1, 2]
split.expand_kernel.pre_run_hooks = []
assert dispatched(call) == 0
""",
    "settings": """
for scope, name, value in ((knobs.runtime, "debug", True), (knobs.compilation, "instrumentation_mode", "other")):
    before = getattr(scope, name)
    setattr(scope, name, value)
    try:
        assert dispatched(call) == 5
    except Exception as error:  # such an instrumentation there is not: Triton says so, and nobody passes it by
        assert "other" in str(error) or "instrumentation" in str(error), error
    setattr(scope, name, before)
    assert dispatched(call) == 0
""",
    "switched off": """
with dispatching():
    assert dispatched(call) == 5
    with dispatching():
        pass
    assert dispatched(call) == 5
assert dispatched(call) == 0
""",
    "misaligned": """
off = torch.empty(32 * 64 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(32, 64).requires_grad_()
assert all(dispatched(step(a, off)) == 5 for _ in range(4))
assert dispatched(call) == 0
""",
    "launch.c": """
from adapter_ops.kernels import launcher
module = launcher._module()
kernels, played = [], []
for run, _ in ops.RUNS.values():
    for cell in run.__closure__:
        for plan in getattr(getattr(cell.cell_contents, "__self__", cell.cell_contents), "plans", {}).values():
            if plan.recording:
                played.append(plan.recording.names)
                kernels += plan.recording.names["compiled"]
assert played and all(module.launch in names.values() for names in played)
reduce = next(k for k in kernels if k.name == "reduce_kernel")

def refuses(error, text, function, *arguments):
    try:
        function(*arguments)
    except error as found:
        assert text in str(found), found
    else:
        raise SystemExit(f"no {error.__name__}: {text}")

def prepare(*parameters, tensors=1):
    return module.prepare(torch.Tensor.data_ptr, 1, tensors, ((reduce.function, 1, 1, 1, 128, 0, parameters),))

pointer, number = (0, 8, 0), (-1, 4, 1)
for parameters in ((pointer,) * 3, ()):
    refuses(ValueError, f"more parameters than the {len(parameters)} given", prepare, *parameters)
refuses(ValueError, "parameter 1 of a kernel", prepare, pointer, number)
refuses(ValueError, "parameter 0 of a kernel", prepare, (1, 8, 0))
refuses(ValueError, "49 parameters", prepare, *[pointer] * 49)
refuses(ValueError, "33 tensors", lambda: prepare(tensors=33))
nothing = module.prepare(torch.Tensor.data_ptr, 1, 2, ())
refuses(TypeError, "a stream and their tensors", module.launch, nothing, 0, x)
refuses(TypeError, "data_ptr", module.launch, nothing, 0, x, 1)
assert module.launch(nothing, 0, x, None) is True and module.launch(nothing, 0, x.flatten()[1:], None) is False
""",
    "triton's launcher": """
from bench.host.cases import CASES, check, hollow
launches = replay.Switch
launches.python = True
hollow()
ops.RUNS.clear()
for case in CASES[::6]:
    wrong = check(case)[1]
    assert not wrong, (case.name, wrong)
launches.python = False
ops.RUNS.clear()
a, x = adapter(), rows(requires_grad=True)
call = step(a, x)
for _ in range(3):
    call()
""",
    "another device": """
torch._C._cuda_exchangeDevice(1)
assert dispatched(call) == 2  # backward runs in a thread of the tensors' device
torch._C._cuda_exchangeDevice(0)
assert dispatched(call) == 0
""",
    "required backend": """
import os
os.environ["ADAPTER_OPS_REQUIRE"] = "triton"
call()
os.environ["ADAPTER_OPS_REQUIRE"] = "cpu"
try:
    call()
    raise SystemExit("no error")
except RuntimeError as error:
    assert "ADAPTER_OPS_REQUIRE=cpu" in str(error)
del os.environ["ADAPTER_OPS_REQUIRE"]
assert dispatched(call) == 0
""",
    "parameters of other kinds": """
good = a.up.bias
a.up.bias = torch.nn.Parameter(torch.empty(63, dtype=torch.bfloat16, device="cuda"))
try:
    a(x)
    raise SystemExit("no error")
except ValueError as error:
    assert "b_up has shape (63,)" in str(error)
a.up.bias = torch.nn.Parameter(torch.empty(64, dtype=torch.float32, device="cuda"))
try:
    a(x)
    raise SystemExit("no error")
except TypeError as error:
    assert "b_up has dtype torch.float32" in str(error)
a.up.bias = good
for part, name in ((a.down, "weight"), (a.up, "weight"), (a.down, "bias")):
    kept = getattr(part, name)
    setattr(part, name, torch.nn.Parameter(torch.empty(kept.shape, dtype=torch.float32, device="cuda")))
    try:
        a(x)
        raise SystemExit("no error")
    except TypeError as error:
        assert "has dtype" in str(error)
    setattr(part, name, kept)
assert dispatched(call) == 0
""",
    "saved tensors": """
wide = torch.empty(32, 128, dtype=torch.bfloat16, device="cuda")[:, :64].detach().requires_grad_()
for _ in range(4):
    step(a, wide)()
def strides(log):
    return [launch.parameters[12] for launch in log if launch.kernel == "dx_dw_kernel"]
dense = lambda t: t.contiguous()
def hooked():
    with torch.autograd.graph.saved_tensors_hooks(dense, lambda t: t):
        return step(a, wide)()
from bench.host.launches import record
assert strides(record(step(a, wide))[0]) == [128]
assert all(strides(record(hooked)[0]) == [64] for _ in range(4))
""",
    "scales": """
for scale in (2.0, 2):
    for _ in range(3):
        a.scale = scale
        call()
a.scale = 2 + 0j
try:
    call()
    raise SystemExit("no error")
except TypeError as error:
    assert "must be a number" in str(error)
a.scale = 1.0
""",
    "wrappers that have left torch.func": """
left = []
torch.func.grad(lambda t: left.append(t) or t.sum())(x.detach().float())
gone = left[0]
b = BottleneckAdapter(64, 16, device="meta").to_empty(device="cuda")
for t in (x.detach().float(), gone, gone, gone):
    assert b(t).shape == (32, 64)
""",
    "kernels are held": """
import gc
calls = next(run.__closure__ for run, _ in ops.RUNS.values())
for run, _ in ops.RUNS.values():
    for cell in run.__closure__:
        if hasattr(cell.cell_contents, "args"):
            cell.cell_contents.args[0].plans.clear()
for kernel in (split.shrink_kernel, split.expand_kernel):
    kernel.device_caches.clear()
gc.collect()
assert dispatched(call) == 0
""",
    "tf32 between forward and backward": """
from bench.host.launches import record
b = BottleneckAdapter(64, 16, device="meta").to_empty(device="cuda")
wide = torch.empty(32, 64, device="cuda", requires_grad=True)
y = b(wide)
def kernels(precision):
    torch.backends.cuda.matmul.fp32_precision = precision
    back = lambda: torch.autograd.grad(y, [wide, *b.parameters()], torch.empty_like(y), retain_graph=True)
    return [[launch.number for launch in record(back)[0]][:2] for _ in range(4)]
exact, rounded, again = kernels("ieee"), kernels("tf32"), kernels("ieee")
assert all(found == exact[0] for found in exact + again) and all(found == rounded[0] for found in rounded)
assert exact[0] != rounded[0]
""",
    "no context": """
import ctypes
flag = ctypes.c_int.in_dll(rig.cuda, "rig_without_context")
flag.value = 1
assert dispatched(call) == 5
flag.value = 0
assert dispatched(call) == 0
""",
    "autocast's dtype": """
from bench.host.launches import record
b = BottleneckAdapter(64, 16, device="meta").to_empty(device="cuda")
wide = torch.empty(32, 64, device="cuda")
def kernels(dtype):
    with torch.autocast("cuda", dtype=dtype):
        return [[launch.number for launch in record(lambda: b(wide))[0]] for _ in range(4)]
found = {dtype: kernels(dtype) + kernels(dtype) for dtype in (torch.bfloat16, torch.float16)}
assert kernels(torch.bfloat16) == found[torch.bfloat16][:4]
assert all(each == kinds[0] for kinds in found.values() for each in kinds)
assert found[torch.bfloat16][0] != found[torch.float16][0]
""",
    "threads": """
others = [(adapter(R=R), rows(48, requires_grad=True)) for R in (24, 40)]
failed = []
def work():
    try:
        for _ in range(50):
            for pair in others:
                step(*pair)()
    except BaseException as error:
        failed.append(error)
threads = [threading.Thread(target=work) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
assert not failed, failed
assert all(dispatched(step(*pair)) == 0 for pair in others)
""",
    "memory": """
import gc
sizes = [rows(M, requires_grad=True) for M in range(1, 30)]
ops.RUNS.clear()
from adapter_ops import kinds
held, kinds.KEPT = kinds.KEPT, 8
for t in sizes:
    a(t)
assert len(ops.RUNS) <= 8
kinds.KEPT = held
""",
    "rows of several tasks": """
from adapter_ops import grouped, grouped_bottleneck_adapter
bf16, whole = (dict(dtype=dtype, device="cuda") for dtype in (torch.bfloat16, torch.int64))
grouped._check_range = lambda *_: None  # neither this nor a sort is on the rig
grouped._index = lambda ids, T: (torch.empty(len(ids), **whole), torch.empty(T + 1, **whole))
ids = torch.empty(32, **whole)
for T in (2, 70):
    w = [torch.empty(T, *shape, **bf16, requires_grad=True) for shape in ((16, 64), (16,), (64, 16), (64,))]
    many = lambda: torch.autograd.grad(grouped_bottleneck_adapter(x, ids, *w), [x, *w], torch.empty_like(x))
    counts = [dispatched(many) for _ in range(4)]
    assert counts == [8, 8, 0, 0], counts
""",
    "no measured kernel": """
import os
from adapter_ops.kernels import plan
assert explain(x, a.down.weight).name == "triton"
plan.target.cache_clear(); ops.RUNS.clear()
os.environ["ADAPTER_OPS_UNMEASURED"] = "0"
found = explain(x, a.down.weight)
assert found.name == "reference" and found.plan.form == "pytorch" and not found.plan.launches
assert "NVIDIA H200" in found.reason and "ADAPTER_OPS_UNMEASURED=1" in found.reason
assert dispatched(call) == 0
many = rows(4096, requires_grad=True)
assert explain(many, a.down.weight).plan.form == "fused" and dispatched(step(a, many)) == 4
os.environ["ADAPTER_OPS_REQUIRE"] = "triton"
try:
    call()
    raise SystemExit("no error")
except RuntimeError as error:
    assert "'reference'" in str(error) and "NVIDIA H200" in str(error)
""",
    "compiled, no measured kernel": """
import os
os.environ["ADAPTER_OPS_UNMEASURED"] = "0"
from adapter_ops.kernels import plan
plan.target.cache_clear()
rig.allow_compile()
graphs = []
def backend(graph, inputs):
    graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
    return graph.forward
compiled = torch.compile(a, backend=backend, fullgraph=True)
for M, op in ((32, False), (40, False), (8192, True), (9000, True)):
    compiled(rows(M))
    assert any("adapter_ops" in target for target in graphs[-1]) == op, (M, graphs[-1])
assert len(graphs) == 3  # one for each side of the limit, after one of a fixed size

M = torch.export.Dim("M", min=2)
program = torch.export.export(a, (rows(),), dynamic_shapes=({0: M},))
assert any("adapter_ops.forward" in str(node.target) for node in program.graph.nodes)

os.environ["ADAPTER_OPS_REQUIRE"] = "triton"
torch.compiler.reset()
try:
    torch.compile(a, backend=backend, fullgraph=True)(rows())
    raise SystemExit("no error")
except RuntimeError as error:
    assert "ADAPTER_OPS_REQUIRE=triton" in str(error)
""",
}


def on_rig(script):
    if lack := build.missing():
        pytest.skip(lack)
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ADAPTER_OPS_REQUIRE")}
    script += "\nsys.stdout.flush(); import os; os._exit(0)"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_everything_that_a_recording_asks_for():
    """One after the other in one process, whose start takes most of the time."""
    separate = ("no measured kernel", "compiled, no measured kernel")
    on_rig(SETUP + RECORDED + "\n".join(text for name, text in CHANGES.items() if name not in separate))


@pytest.mark.parametrize("name", ["no measured kernel", "compiled, no measured kernel"])
def test_what_a_process_decides_once(name):
    on_rig(SETUP + RECORDED + CHANGES[name])


def test_another_version_of_triton_is_left_to_its_dispatcher():
    script = "from bench.host import rig\nrig.start()\nimport triton\ntriton.__version__ = '4.0.0'\n"
    on_rig(script + SETUP + "assert [dispatched(call) for _ in range(4)] == [5, 5, 5, 5]")
