"""How often every kernel reads and writes each of its arguments: formulas, which bench.traffic holds the kernels to.

Of a launch's arguments and grid, (times read, times written). kernels/README.md has their sums.
"""

from fractions import Fraction
from types import SimpleNamespace
from typing import NamedTuple

from triton import cdiv


class Part(NamedTuple):
    """Of a tensor of which not all is touched."""

    times: Fraction  # the elements asked for, over all elements
    share: Fraction  # of its elements that are touched


# argument -> how often each of its elements is asked for; a tensor that is None moves nothing
Times = dict[str, int | Part]
PARTIALS = ("up_partial_ptr", "b_up_partial_ptr", "down_partial_ptr")


class Tiles:
    """The tiles of `side` rows of a launch: `count` of one adapter, or those that the counts of the tasks make.

    Rows without a task are none of `served`; what has one part a task, or one a tile, is touched where there are rows.
    """

    def __init__(self, a: SimpleNamespace, side: int) -> None:
        self.grouped: bool = a.counts is not None
        own = a.counts[1:] if self.grouped else [a.M]
        each = [cdiv(count, side) for count in own]
        self.count: int = sum(each)
        self.M: int = sum(a.counts) if self.grouped else a.M
        self.served: int = sum(own)
        self.idle: int = self.M - self.served
        self.tasks, self.busy = len(own), sum(tiles > 0 for tiles in each)

    def rows(self, times: int, idle: int = 0) -> int | Part:
        """Of a tensor [M, ...]: `times` for a row with a task, `idle` for one without."""
        if not self.idle:
            return times
        share = Fraction((times > 0) * self.served + (idle > 0) * self.idle, self.M)
        return Part(Fraction(times * self.served + idle * self.idle, self.M), share)

    def weights(self, times: int = 1) -> int | Part:
        """Of a parameter, which every tile of its task reads `times`."""
        if not self.grouped:
            return times * self.count
        return Part(Fraction(times * self.count, self.tasks), Fraction((times > 0) * self.busy, self.tasks))

    def partials(self, slots: int) -> int | Part:
        """Of partial sums, of which there is room for `slots`, and one is made for each tile."""
        return Part(Fraction(self.count, slots), Fraction(self.count, slots)) if self.grouped else 1

    def index(self, times: int, idle: int) -> Times:
        """The order, `times` for a row with a task; and the table, which as many programs of a tile read."""
        return {"order_ptr": self.rows(times, idle)} if self.grouped else {}


def _scale(a: SimpleNamespace, tiles: Tiles) -> Times:
    """A scale that is one value is asked for by every column that it meets."""
    return {"scale_ptr": tiles.weights(1 if a.SCALE_STRIDE else a.D)}


def fused_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """A program reads its rows of x, as x and as the residual, and all weights."""
    tiles = Tiles(a, a.BLOCK_M)
    weights: Times = dict.fromkeys(("w_down_ptr", "b_down_ptr", "w_up_ptr", "b_up_ptr"), tiles.weights())
    index = tiles.index(1, 1 + cdiv(a.D, a.BLOCK_D)) | {"tiles_ptr": 1}
    return {"x_ptr": tiles.rows(1), "residual_ptr": 1} | weights | _scale(a, tiles) | index, {"y_ptr": 1, "z_ptr": 1}


def resident_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """Every tile of rows reads x once and all weights; b_down stays in a program's registers."""
    tiles, programs = Tiles(a, a.BLOCK_M), a.grid[0]
    reads: Times = dict.fromkeys(("w_down_desc", "w_up_desc", "b_up_ptr"), tiles.count)
    reads |= {"x_desc": 1, "b_down_ptr": programs}
    return reads | _scale(a, tiles), {"y_desc": 1, "z_ptr": 1}


def shrink_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """Every block of R reads x, and every block of rows the weights; splits of D share nothing."""
    tiles, r_blocks = Tiles(a, a.BLOCK_M), cdiv(a.R, a.BLOCK_R)
    reads = {"x_ptr": tiles.rows(r_blocks), "w_ptr": tiles.weights(), "b_ptr": tiles.weights()}
    index = tiles.index(r_blocks, r_blocks) | {"tiles_ptr": r_blocks}
    return reads | index, {"partial_ptr": 1, "z_ptr": 1, "h_ptr": tiles.rows(1)}


def combine_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """Every partial sum is read once; every row reads b_down."""
    return {"partial_ptr": 1, "b_ptr": a.MR // a.R}, {"z_ptr": 1, "h_ptr": 1}


def expand_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """Every block of columns reads h, and every block of rows the weights."""
    tiles, columns = Tiles(a, a.BLOCK_M), cdiv(a.D, a.BLOCK_D)
    reads = {"h_ptr": tiles.rows(columns), "w_ptr": tiles.weights(), "b_up_ptr": tiles.weights(), "residual_ptr": 1}
    index = tiles.index(columns, 2 * columns) | {"tiles_ptr": columns}
    return reads | _scale(a, tiles) | index, {"y_ptr": 1}


def dz_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """Every block of R reads dy, and every block of rows W_up; where only h is wanted, z is all that is read."""
    need_dz = a.dz_ptr is not None
    tiles, r_blocks = Tiles(a, a.BLOCK_M), cdiv(a.R, a.BLOCK_R)
    reads = {"dy_ptr": tiles.rows(need_dz * r_blocks), "z_ptr": tiles.rows(1), "w_up_ptr": tiles.weights(need_dz)}
    reads |= {"scale_ptr": tiles.weights(need_dz * r_blocks)}
    index = tiles.index(r_blocks, r_blocks) | {"tiles_ptr": r_blocks}
    sums = {"b_down_partial_ptr": tiles.partials(a.grid[0] // r_blocks)}
    return reads | index, {"dz_ptr": tiles.rows(1), "h_ptr": tiles.rows(1)} | sums


def dx_dw_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """Every block of columns reads dz and h, every block of R dy and x; every slice reads W_down for dx."""
    tiles, columns, r_blocks = Tiles(a, a.rows_per_slice), cdiv(a.D, a.BLOCK_D), cdiv(a.R, a.BLOCK_R)
    dx, up, down = (p is not None for p in (a.dx_ptr, a.up_partial_ptr, a.down_partial_ptr))
    need_dy = up or a.b_up_partial_ptr is not None or (dx and a.ADD_DY)
    reads = {"dy_ptr": tiles.rows(need_dy * r_blocks, dx and a.ADD_DY), "x_ptr": tiles.rows(down * r_blocks)}
    reads |= {"w_down_ptr": tiles.weights(dx), "h_ptr": tiles.rows(up * columns)}
    reads |= {"dz_ptr": tiles.rows((dx or down) * columns)}
    index = tiles.index(columns * r_blocks, dx * columns) | {"tiles_ptr": columns * r_blocks}
    return reads | index, {"dx_ptr": 1} | dict.fromkeys(PARTIALS, tiles.partials(a.grid[1]))


def reduce_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """Every partial sum is read once, and every gradient written once."""
    dscale = a.dscale_ptr is not None
    reads: Times = {"w_up_ptr": dscale, "b_up_ptr": dscale, "scale_ptr": 1 if a.SCALE_STRIDE else a.D}
    reads |= dict.fromkeys((*PARTIALS, "b_down_partial_ptr"), 1)
    if a.counts is not None:
        T = len(a.counts) - 1
        if a.slice_ends_ptr is not None:
            reads |= dict.fromkeys(PARTIALS, Tiles(a, a.sides["slice_ends_ptr"]).partials(a.S))
        if a.block_ends_ptr is not None:
            reads["b_down_partial_ptr"] = Tiles(a, a.sides["block_ends_ptr"]).partials(a.P)
        ends = Part(Fraction(2 * T * a.grid[0], T + 1), Fraction(1))  # its task's, and the one before it
        reads |= {"slice_ends_ptr": ends, "block_ends_ptr": ends}
    return reads, dict.fromkeys(("dw_up_ptr", "db_up_ptr", "dw_down_ptr", "db_down_ptr", "dscale_ptr"), 1)


def table_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """Every program reads all counts; one writes the ends."""
    return {"counts_ptr": a.grid[0]}, {"tiles_ptr": 1, "ends_ptr": 1}


FORMULAS = {
    f.__name__: f
    for f in (
        fused_kernel,
        resident_kernel,
        shrink_kernel,
        combine_kernel,
        expand_kernel,
        dz_kernel,
        dx_dw_kernel,
        reduce_kernel,
        table_kernel,
    )
}
NOT_COUNTED = {"resident_kernel"}  # Gluon has no interpreter
