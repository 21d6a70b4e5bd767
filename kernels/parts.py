"""Pieces of kernels that more than one kernel is made of."""

import triton
import triton.language as tl


@triton.jit
def finish(
    u,  # [BLOCK_M, BLOCK_D]: h · W_upᵀ
    b_up,  # [BLOCK_D] or None
    scale,  # number; used where s is None
    s,  # [BLOCK_D], the scale of each channel, or None
    ACC: tl.constexpr,  # dtype of u
):
    """scale · (u + b_up), in ACC; what the residual is added to."""
    if b_up is not None:
        u += b_up.to(ACC)[None, :]
    if s is not None:
        u *= s.to(ACC)[None, :]
    else:
        u *= scale
    return u
