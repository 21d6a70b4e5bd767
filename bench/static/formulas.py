"""How often every kernel reads and writes each of its arguments: formulas, which bench.traffic holds the kernels to.

Of a launch's arguments and grid, (times read, times written). kernels/README.md has their sums.
"""

from types import SimpleNamespace

from triton import cdiv

Times = dict[str, int]  # argument -> how often each of its elements is asked for; a tensor that is None moves nothing
PARTIALS: Times = dict.fromkeys(("up_partial_ptr", "b_up_partial_ptr", "down_partial_ptr"), 1)


def _scale(a: SimpleNamespace, times: int) -> Times:
    """A scale that is one value is asked for by every column that it meets."""
    return {"scale_ptr": times * (1 if a.SCALE_STRIDE else a.D)}


def fused_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """A program reads its rows of x, as x and as the residual, and all weights."""
    rows = cdiv(a.M, a.BLOCK_M)
    weights = dict.fromkeys(("w_down_ptr", "b_down_ptr", "w_up_ptr", "b_up_ptr"), rows)
    return {"x_ptr": 1, "residual_ptr": 1} | weights | _scale(a, rows), {"y_ptr": 1, "z_ptr": 1}


def resident_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """Every tile of rows reads x once and all weights; b_down stays in a program's registers."""
    rows, programs = cdiv(a.M, a.BLOCK_M), a.grid[0]
    weights = dict.fromkeys(("w_down_desc", "w_up_desc", "b_up_ptr"), rows) | {"b_down_ptr": programs}
    return {"x_desc": 1} | weights | _scale(a, rows), {"y_desc": 1, "z_ptr": 1}


def shrink_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """Every block of R reads x, and every block of rows the weights; splits of D share nothing."""
    rows = cdiv(a.M, a.BLOCK_M)
    reads = {"x_ptr": cdiv(a.R, a.BLOCK_R), "w_ptr": rows, "b_ptr": rows}
    return reads, {"partial_ptr": 1, "z_ptr": 1, "h_ptr": 1}


def combine_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """Every partial sum is read once; every row reads b_down."""
    return {"partial_ptr": 1, "b_ptr": a.MR // a.R}, {"z_ptr": 1, "h_ptr": 1}


def expand_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """Every block of columns reads h, and every block of rows the weights."""
    rows, columns = cdiv(a.M, a.BLOCK_M), cdiv(a.D, a.BLOCK_D)
    reads = {"h_ptr": columns, "w_ptr": rows, "b_up_ptr": rows, "residual_ptr": 1}
    return reads | _scale(a, rows), {"y_ptr": 1}


def dz_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """Every block of R reads dy, and every block of rows W_up; where only h is wanted, z is all that is read."""
    need_dz = a.dz_ptr is not None
    rows, r_blocks = need_dz * cdiv(a.M, a.BLOCK_M), cdiv(a.R, a.BLOCK_R)
    reads = {"dy_ptr": need_dz * r_blocks, "z_ptr": 1, "w_up_ptr": rows, "scale_ptr": rows * r_blocks}
    return reads, {"dz_ptr": 1, "h_ptr": 1, "b_down_partial_ptr": 1}


def dx_dw_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """Every block of columns reads dz and h, every block of R dy and x; every slice reads W_down for dx."""
    columns, r_blocks, slices = cdiv(a.D, a.BLOCK_D), cdiv(a.R, a.BLOCK_R), a.grid[1]
    dx, up, down = (p is not None for p in (a.dx_ptr, a.up_partial_ptr, a.down_partial_ptr))
    need_dy = up or a.b_up_partial_ptr is not None or (dx and a.ADD_DY)
    reads = {"dy_ptr": need_dy * r_blocks, "x_ptr": down * r_blocks, "w_down_ptr": dx * slices}
    return reads | {"h_ptr": up * columns, "dz_ptr": (dx or down) * columns}, {"dx_ptr": 1} | PARTIALS


def reduce_kernel(a: SimpleNamespace) -> tuple[Times, Times]:
    """Every partial sum is read once, and every gradient written once."""
    dscale = a.dscale_ptr is not None
    reads = PARTIALS | {"b_down_partial_ptr": 1, "w_up_ptr": dscale, "b_up_ptr": dscale} | _scale(a, 1)
    return reads, dict.fromkeys(("dw_up_ptr", "db_up_ptr", "dw_down_ptr", "db_down_ptr", "dscale_ptr"), 1)


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
    )
}
NOT_COUNTED = {"resident_kernel"}  # Gluon has no interpreter
