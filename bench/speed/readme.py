"""python -m bench readme: the tables of the documents, made from the CSV files that their markers name.

A marker `<!-- bench: bench/results/F.csv M=16384,65536 mode=fwd -->` opens a table of the rows that have one of these
values, and `<!-- bench end -->` closes it; what is between them is written here. So does
`<!-- paper: bench/results/paper glue docstrings -->`, by folder, study and task, with `<!-- paper end -->`. Paths in
markers are relative to the folder of the document.
"""

import re
import statistics
from pathlib import Path

from ..cli import Parser, input_file
from ..files import write_whole
from ..paper import report
from .cases import PROVIDERS
from .rows import COLUMNS, Row, read, row_of

MARKER = re.compile(r"(<!-- bench: (\S+?\.csv)((?: \w+=\S+)*) -->\n).*?(<!-- bench end -->)", re.DOTALL)
PAPER = re.compile(r"(<!-- paper: (\S+) (\w+) (\S+) -->\n).*?(<!-- paper end -->)", re.DOTALL)

DOCUMENTS = ("README.md", "bench/README.md", "bench/paper/README.md")  # of this repository, that have markers


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m bench readme", description=__doc__)
    parser.add_argument("file", nargs="*", type=input_file, default=DOCUMENTS, help=f"default: {', '.join(DOCUMENTS)}")
    args = parser.parse_args(argv)
    filled = {}
    with parser.refusing():
        for path in map(Path, args.file):
            text = path.read_text(encoding="utf-8")
            if not (MARKER.search(text) or PAPER.search(text)):
                raise ValueError(f"{path} has no marker of a table; see --help")
            filled[path] = fill_in(text, path.parent)
    for path, text in filled.items():
        write_whole(path, text)
    return 0


def fill_in(text: str, folder: Path) -> str:
    """The text with its tables made anew; paths in the markers are relative to `folder`.

    Raises:
        OSError: a file that a marker names cannot be read.
        ValueError: a file that a marker names is not of the form, a column or a study is not known, or no row is left.
    """

    def replace(match: re.Match[str]) -> str:
        wanted = dict(pair.split("=", 1) for pair in match[3].split())
        unknown = wanted.keys() - set(COLUMNS)
        if unknown:
            raise ValueError(f"unknown columns {sorted(unknown)} in a marker; known: {', '.join(COLUMNS)}")
        kept = [
            r for r in read(folder / match[2]) if all(str(getattr(r, n)) in v.split(",") for n, v in wanted.items())
        ]
        if not kept:
            raise ValueError(f"no row of {match[2]} has {match[3].strip()}")
        return f"{match[1]}\n{table(kept)}\n{match[4]}"

    def study(match: re.Match[str]) -> str:
        return f"{match[1]}\n{report.from_files(folder / match[2], match[3], match[4])}\n{match[5]}"

    return PAPER.sub(study, MARKER.sub(replace, text))


def table(rows: list[Row]) -> str:
    """Times in milliseconds, a column for each provider; then what adapter_ops makes of it."""
    providers = [name for name in PROVIDERS if any(r.provider == name for r in rows)]
    heads = ["M×D×R", "dtype", "mode", *providers, "speed-up", "of the floor", "peak memory", "saved"]
    lines = [caption(rows), "", row_of(heads), row_of(["---", "---", "---"] + ["---:"] * (len(heads) - 3))]
    groups: dict[tuple[int, int, int, str, str], dict[str, Row]] = {}
    for r in rows:
        groups.setdefault((r.M, r.D, r.R, r.dtype, r.mode), {})[r.provider] = r
    for (M, D, R, dtype, mode), group in groups.items():
        timed = {n: r.ms for n, r in group.items() if r.ms is not None and n != "copy"}
        best = min(timed, key=lambda n: timed[n]) if timed else ""
        cells = [f"{M}×{D}×{R}", dtype, mode]
        for name in providers:
            text = milliseconds(group[name]) if name in group else ""
            cells.append(f"**{text}**" if name == best else text)
        own, eager = group.get("adapter_ops"), group.get("eager")
        cells.append(f"{own.speedup:.2f}×" if own and own.speedup else "")
        cells.append(f"{own.percent_of_floor:.0f}%" if own and own.percent_of_floor else "")
        cells += [against(own, eager, "peak_bytes"), against(own, eager, "saved_bytes")]
        lines.append(row_of(cells))
    if text := summary(list(groups.values())):
        lines += ["", text]
    return "\n".join(lines)


def summary(groups: list[dict[str, Row]]) -> str:
    """The peers' times over adapter_ops': geometric mean over the rows of the table, and the lowest."""
    ratios: dict[str, list[float]] = {}
    for group in groups:
        own = group.get("adapter_ops")
        for name, row in group.items():
            if own and own.ms and row.ms and name not in ("adapter_ops", "copy"):
                ratios.setdefault(name, []).append(row.ms / own.ms)
    parts = [f"{name} {statistics.geometric_mean(r):.2f}× ({min(r):.2f}×)" for name, r in ratios.items()]
    return f"Speed-up over each in geometric mean (lowest): {', '.join(parts)}." if parts else ""


def caption(rows: list[Row]) -> str:
    first = rows[0]
    kernel = any(r.kernel_ms is not None for r in rows)
    rates = {r.dtype: (r.copy_bytes_per_second or 0, r.matmul_flops_per_second or 0) for r in rows}
    floors = "; ".join(f"{d}: copy {c / 1e9:.0f} GB/s, matmul {m / 1e12:.3g} TFLOP/s" for d, (c, m) in rates.items())
    return (
        f"{first.device}; torch {first.torch}, triton {first.triton}; commit {first.commit}; {first.date}. {floors}. "
        f"Median {'kernel' if kernel else 'user'} time in ms, the fastest in bold; memory in MB, adapter_ops / eager."
    )


def milliseconds(row: Row) -> str:
    """Three digits of the time, or why there is none."""
    if row.ms is None:
        return "wrong" if row.note.startswith("wrong") else "failed"
    return f"{row.ms:.3g}" if row.ms < 100 else f"{row.ms:.0f}"


def against(own: Row | None, eager: Row | None, column: str) -> str:
    """Megabytes of both."""
    pair: list[int] = [b for row in (own, eager) if (b := getattr(row, column, None)) is not None]
    return " / ".join(f"{b / 1e6:.1f}" for b in pair) if len(pair) == 2 else ""
