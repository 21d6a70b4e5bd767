"""The benchmark: what it refuses, what it writes down, and what is made of that."""

from pathlib import Path

import pytest
import torch
from helpers_bench import made_up, write

from bench.shape import Shape
from bench.speed import command as bench
from bench.speed import measure
from bench.speed import readme as table
from bench.speed import runner as run
from bench.speed.cases import MODES, PROVIDERS, Case, Gate, Provider
from bench.speed.rows import COLUMNS, read

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
FLOORS = measure.Floors(1e10, 1e11)
CPU_PEERS = ("eager", "in-place", "adapter_ops", "copy")


@pytest.fixture
def rows(aten):
    """rows(*providers, modes=..., device=...): a run on one small shape."""

    def one(*names, modes=MODES, device="cpu"):
        case = Case(Shape(24, 40, 6), torch.float32, "cpu")
        case.device = device
        return {(r.provider, r.mode): r for rs in run.run_case(case, names, modes, 0.02, FLOORS) for r in rs}

    return one


@pytest.mark.parametrize("text", ["", "1x2", "1x2x3x4", "0x2x3", "1x-2x3", "axbxc", "1.5x2x3"])
def test_shape_names_what_it_was_given(text):
    with pytest.raises(ValueError, match="not of the form MxDxR"):
        Shape.parse(text)
    assert str(Shape.parse("3x4x5")) == "3x4x5"


def test_a_provider_whose_package_is_missing_is_refused(capsys, monkeypatch):
    monkeypatch.setitem(PROVIDERS, "elsewhere", Provider(None, package="no_such_package"))
    with pytest.raises(SystemExit):
        bench.main(["--providers", "elsewhere"])
    assert "provider 'elsewhere' needs the package 'no_such_package'" in capsys.readouterr().err


def test_the_command_writes_what_it_prints(aten, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "measure_floors", lambda dtype, device: FLOORS)
    out = tmp_path / "deep" / "out.csv"
    status = bench.main(
        f"--shapes 8x16x4,5x12x3 --dtypes float32 --providers {','.join(CPU_PEERS)} --seconds 0.02 --device cpu "
        f"--commit abc --out {out}".split()
    )
    found = read(out)
    assert status == 0 and list(out.parent.iterdir()) == [out]
    assert out.read_text().splitlines()[0] == ",".join(COLUMNS)
    wanted = [(s, m, p) for s in ((8, 16, 4), (5, 12, 3)) for m in MODES for p in CPU_PEERS if m in PROVIDERS[p].modes]
    assert [(r.shape, r.mode, r.provider) for r in found] == wanted
    for r in found:
        assert r.user_ms > 0 and r.user_p20_ms <= r.user_ms <= r.user_p80_ms and r.user_speedup > 0
        assert (r.error is None) == (r.provider == "copy") and r.commit == "abc" and r.torch == torch.__version__
        assert r.percent_of_floor == pytest.approx(100 * r.floor_ms / r.user_ms, rel=1e-4)
    assert "5×12×3" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_a_wrong_provider_gets_no_number(rows, monkeypatch, mode, factor):
    monkeypatch.setitem(PROVIDERS, "adapter_ops", Provider(lambda adapter: lambda x: adapter(x) * factor))
    found = rows("eager", "adapter_ops", modes=[mode])
    wrong = found["adapter_ops", mode]
    assert wrong.note.startswith("wrong") and wrong.error is not None
    assert wrong.user_ms is wrong.user_speedup is wrong.percent_of_floor is wrong.peak_bytes is None
    assert found["eager", mode].user_ms is not None


def test_a_provider_that_raises_is_its_own_loss(rows, monkeypatch):
    def broken(adapter):
        raise RuntimeError("a compiler's\nbug")

    monkeypatch.setitem(PROVIDERS, "compile", Provider(broken))
    found = rows("compile", "eager", "adapter_ops", modes=["fwd"])
    assert found["compile", "fwd"].note == "RuntimeError: a compiler's bug" and found["compile", "fwd"].user_ms is None
    assert found["eager", "fwd"].user_ms is not None and found["adapter_ops", "fwd"].user_speedup > 0


def test_work_is_the_floors():
    shape = Shape(3, 5, 2)
    assert measure.work(shape, torch.bfloat16, "fwd") == (2 * 15 * 2, 4 * 30)
    assert measure.work(shape, torch.bfloat16, "bwd") == (3 * 15 * 2, 8 * 30)
    assert measure.work(shape, torch.float32, "fwd+bwd") == (5 * 15 * 4, 12 * 30)
    assert measure.Floors(10, 2).seconds(20, 2) == 2 and measure.Floors(10, 2).seconds(10, 6) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_for_backward_is_x_and_z(path, dtype):
    device = "cuda" if path == "gpu" else "cpu"
    case = Case(Shape(37, 24, 6), dtype, device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        case.adapter(case.xs[0])
    parameters = {p.data_ptr() for p in case.parameters}
    rest = [t for t in saved if t.data_ptr() not in parameters]
    assert [(tuple(t.shape), t.dtype) for t in rest] == [((37, 24), dtype), ((37, 6), dtype)]
    assert rest[0].data_ptr() == case.xs[0].data_ptr()
    assert measure.saved_bytes(case, case.adapter) == 37 * (24 + 6) * dtype.itemsize


@pytest.mark.parametrize("mode", MODES)
def test_peak_memory_is_below_eagers(aten, mode):
    case = Case(Shape(512, 256, 16), torch.float32, "cpu")
    own, eager = (measure.peak_memory(case, case.make(name), mode) for name in ("adapter_ops", "eager"))
    tensors = {"fwd": 1, "bwd": 2, "fwd+bwd": 2}[mode]  # y; y and dx
    assert tensors * 512 * 256 * 4 <= own < eager


def test_copy_moves_the_bytes_that_must_move():
    case = Case(Shape(6, 10, 2), torch.float32, "cpu")
    for mode in MODES:
        assert 2 * case.call(None, mode)().nbytes == measure.work(case.shape, case.dtype, mode)[0]


class Graph:
    """A CUDA graph where there is none: it calls again what was captured."""

    def __init__(self, calls):
        self.calls = calls

    def replay(self):
        for call in self.calls:
            call()


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def elapsed_time(self, end):
        return 0.5  # ms


def test_the_steps_of_a_gpu_run(rows, monkeypatch):
    """One without a GPU: kernel time is per call, and what cannot be captured keeps its user time."""

    def capture(calls):
        if isinstance(calls[0](), torch.Tensor) and not calls[0]().isfinite().all():
            raise RuntimeError("operation not permitted when stream is capturing")
        return Graph(calls)

    monkeypatch.setattr(measure, "capture", capture)
    monkeypatch.setattr(measure, "nodes", lambda graph: 3 * len(graph.calls))
    for name, stand_in in {"Event": Event, "synchronize": lambda: None, "memory_allocated": lambda: 7}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 107)
    monkeypatch.setattr(Case, "_copy", lambda self, x, dy, mode: lambda: torch.full((1,), float("nan")))
    found = rows("eager", "adapter_ops", "copy", modes=["fwd", "bwd"], device="cuda")
    for key, row in found.items():
        if key[0] == "copy":
            assert row.kernel_ms is None and row.user_ms > 0 and "no kernel time: RuntimeError" in row.note
        else:
            assert (row.kernel_ms, row.launches, row.peak_bytes, row.kernel_speedup) == (0.5, 3, 100, 1.0)
            assert row.percent_of_floor == pytest.approx(100 * row.floor_ms / 0.5)


@pytest.mark.gpu
def test_on_a_gpu_every_row_has_every_figure(tmp_path, capsys):
    out = tmp_path / "out.csv"
    bench.main(f"--shapes 4096x256x16,3x64x8 --providers {','.join(CPU_PEERS)} --seconds 0.02 --out {out}".split())
    for r in read(out):
        assert r.kernel_ms and r.user_ms and r.launches and not r.note.startswith(("wrong", "no kernel")), r
        assert r.launches == 1 or r.provider != "copy"
    case = Case(Shape(256, 64, 8), torch.bfloat16, "cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        call = case.call(case.make("eager"), "fwd+bwd")
        call()
        launches = measure.nodes(measure.capture([call]))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert launches == len(kernels)


def test_table(tmp_path):
    found = list(made_up([(8, 16, 4), (16, 16, 4)]))
    found[2].kernel_ms = found[2].user_ms = None
    found[2].note = "wrong: 3 times eager's error, not timed"
    write(tmp_path / "f.csv", found)
    text = "before\n<!-- bench: f.csv M=8 mode=fwd,bwd -->\nstale\n<!-- bench end -->\nafter\n"
    new = table.fill_in(text, tmp_path)
    assert new.startswith("before\n<!-- bench: f.csv M=8 mode=fwd,bwd -->\n") and new.endswith("\nafter\n")
    assert "stale" not in new and table.fill_in(new, tmp_path) == new
    assert "| 8×16×4 | bfloat16 | fwd | 9 | **5** | wrong | 3 |" in new and "16×16×4" not in new
    with pytest.raises(ValueError, match="unknown columns"):
        table.fill_in(text.replace("M=8", "N=8"), tmp_path)
    with pytest.raises(ValueError, match="no row"):
        table.fill_in(text.replace("M=8", "M=9"), tmp_path)


def test_table_ends_with_the_speed_up_over_each():
    rows = list(made_up([(8, 16, 4), (16, 16, 4)]))
    last = table.table(rows).splitlines()[-1]
    assert last == "Speed-up over each in geometric mean (lowest): eager 2.57× (2.45×), in-place 1.39× (1.36×)."
    assert "geometric" not in table.table([r for r in rows if r.provider != "adapter_ops"])


def test_a_file_with_other_columns_is_refused(tmp_path):
    (tmp_path / "f.csv").write_text("provider,ms\neager,1\n")
    with pytest.raises(ValueError, match="has columns"):
        read(tmp_path / "f.csv")


@pytest.mark.parametrize("name", table.DOCUMENTS)
def test_documents_have_the_tables_of_the_committed_files(name):
    """Made by `python -m bench readme`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert table.MARKER.search(text) or table.PAPER.search(text)
    assert table.fill_in(text, (ROOT / name).parent) == text


def test_every_document_is_filled_in_or_none(tmp_path, monkeypatch, capsys):
    """Paths in the markers of a document are relative to its folder."""
    write(tmp_path / "bench/f.csv", made_up([(8, 16, 4)]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table, "DOCUMENTS", ("README.md", "bench/README.md"))
    stale = {
        name: f"<!-- bench: {csv} -->\n<!-- bench end -->\n" for name, csv in zip(table.DOCUMENTS, ["bench/f.csv"] * 2)
    }
    for name, text in stale.items():
        Path(name).write_text(text)
    with pytest.raises(SystemExit):
        table.main([])
    assert all(Path(name).read_text() == text for name, text in stale.items())
    Path("bench/README.md").write_text(stale["README.md"].replace("bench/f.csv", "f.csv"))
    assert table.main([]) == 0
    assert all("| 8×16×4 |" in Path(name).read_text() for name in table.DOCUMENTS)


def test_gate_compares_like_with_like():
    """The in-place form is tanh GELU on a GPU and has its own oracle there."""
    case = Case(Shape(16, 24, 8), torch.float64, "cpu")
    errors = Gate(case).check("eager", case.make("eager"), "fwd+bwd")
    assert errors.right and errors.error < 1e-14
    assert PROVIDERS["in-place"].activation("cuda") == "gelu_tanh" and PROVIDERS["in-place"].activation("cpu") == "gelu"
