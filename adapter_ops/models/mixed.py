"""A batch whose examples have different tasks: what runs for it where a model runs one task's modules otherwise.

A `TaskBatch` takes the place of a `Task` for hooks.py. At each site it has a `GroupedLayer` for every kind of adapter
among the tasks, which is one where they have one config; for each LayerNorm and head a `GroupedNorm` or `GroupedHead`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..grouped import grouped_bottleneck_adapter
from .layers import AdapterLayer, TokenBatchNorm
from .stacks import Grouped, Rows, Stack, of_rows, state_of

GATHERED = 1 << 24  # elements of a head's parameters, one set for each example, up to which one product is made
_INPUTS = ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
_broadcasts: dict[type, bool] = {}


class GroupedLayer(Grouped):
    """The adapters of one kind at one site, as `AdapterLayer` is the adapter of one task there.

    Args:
        like: the adapter of one of the tasks, for everything that they have in common.
        bottlenecks: `depth` stacks of `BottleneckStack`'s tensors.
        norm: of the parameters of the normalisations inside the adapters, if they have any.
        other arguments: see `Grouped`.
    """

    def __init__(
        self,
        like: AdapterLayer,
        bottlenecks: Sequence[Any],
        norm: Stack | None,
        entry_of: Sequence[int] | None,
        device: torch.device,
    ) -> None:
        super().__init__(entry_of, -1, device)
        self.like, self.bottlenecks, self.norm = like, list(bottlenecks), norm
        self.activation: str = like.bottlenecks[0].activation  # type: ignore[assignment]
        self.reads, self.adds_to, self.reads_input = like.reads, like.adds_to, like.reads_input
        self.ln_after = like.ln_after
        # Whether rows of other tasks come out of the adapter as they were at the site.
        self.passes = like.adds_to == "output" and not (norm is not None and like.norm_position == "after")

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        """x, residual [rows, ..., D] → the same with what the bottlenecks make of x, on the rows of these tasks. The
        other rows are of no use."""
        ids = self.rows.at(x)
        like = self.like
        if self.norm is not None and like.norm_position == "before":
            x = self._norm(x, ids)
        for stack in self.bottlenecks:
            t = stack.tensors()
            weights = t["w_down"], t["b_down"], t["w_up"], t["b_up"]
            options: Any = dict(activation=self.activation, scale=t.get("scale", stack.number))
            if like.training and like.dropout:
                added = grouped_bottleneck_adapter(x, ids, *weights, residual=torch.zeros_like(residual), **options)
                residual = residual + nn.functional.dropout(added, like.dropout)
            else:
                residual = grouped_bottleneck_adapter(x, ids, *weights, residual=residual, **options)
            x = residual
        if self.norm is not None and like.norm_position == "after":
            x = self._norm(x, ids)
        return x

    def select(self, y: Tensor, other: Tensor) -> Tensor:
        """y on the rows of these tasks, and `other` on the rest."""
        if self.passes or (not torch.compiler.is_compiling() and self.rows.whole):
            return y
        return torch.where(of_rows(self.rows.at(y) >= 0, y), y, other)

    def _norm(self, x: Tensor, ids: Tensor) -> Tensor:
        assert self.norm is not None
        norm: Any = self.like.norm
        t = {name: of_rows(p[ids], x) for name, p in self.norm.tensors().items()}  # −1 takes the last one, to no effect
        if not isinstance(norm, TokenBatchNorm):
            return _normed(nn.functional.layer_norm, x, (norm.normalized_shape, None, None, norm.eps), t)
        if norm.training:
            raise RuntimeError(ROWS_MIXED)
        normed = (x - t["running_mean"]) * (t["running_var"] + norm.eps).rsqrt()
        return (normed * t["weight"] + t["bias"]).to(x.dtype)


ROWS_MIXED = (
    "norm='batch' takes its statistics from all rows of a batch while it trains, and in a batch of several tasks these "
    "are not the task's own: call model.eval(), or train such a task by itself"
)


def _normed(function: Callable[..., Tensor], x: Tensor, options: tuple[Any, ...], t: Mapping[str, Tensor]) -> Tensor:
    """function(x) · weight + bias, in fp32 at least and rounded once, as PyTorch's own normalisations are."""
    dtype, y = x.dtype, x
    if dtype in (torch.float16, torch.bfloat16):
        dtype = function(x[:0], *options).dtype  # under autocast it may be fp32
        y = x.float()
    y = function(y, *options)
    y = y * t["weight"] if "weight" in t else y
    y = y + t["bias"] if "bias" in t else y
    return y.to(dtype)


class GroupedHead(Grouped):
    """Copies that tasks have of a module of the base, such as a head: each runs on the rows of its tasks.

    One product serves all rows where the module is an nn.Linear that is not too large. Under torch.compile the copies
    of any module whose sizes agree run as one, by torch.func. Elsewhere each copy runs on its rows, which are then put
    back in their order. Where the copies' outputs differ in their last dimension they are filled up with −inf.

    Args:
        calls: what runs for each entry; None for what `state` has there.
        base: what runs for rows whose entry is `without`.
        like: a module of the same structure, none of whose parameters is read.
        stack: the parameters by entry, with the base's as the last one; None where sizes differ or are large.
        state: the parameters of one entry, where `calls` has None.
        base_fits: whether the last entry of the stack is the base's.
    """

    def __init__(
        self,
        calls: Sequence[Callable[..., Any] | None],
        base: Callable[..., Any],
        like: nn.Module,
        stack: Stack | None,
        entry_of: Sequence[int] | None,
        device: torch.device,
        state: Callable[[int], dict[str, Tensor]] | None = None,
        base_fits: bool = True,
    ) -> None:
        super().__init__(entry_of, len(calls), device)
        self.calls, self.base, self.like, self.stack, self.state = list(calls), base, like, stack, state
        self.elements, self.base_fits = elements(like), base_fits

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inputs = [t for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > 0]
        if not inputs:
            raise ValueError(f"a task's own {type(self.like).__name__} was called without a tensor, so without rows")
        ids = self.rows.at(inputs[0])
        compiling = torch.compiler.is_compiling()
        small = len(self.rows.ids) * self.elements <= GATHERED or (compiling and self.state is not None)
        if self.stack is not None and small and (self.base_fits or self.without not in self.rows.entries):
            if type(self.like) is nn.Linear and not (self.like._forward_hooks or self.like._forward_pre_hooks):
                return self._product(inputs[0])
            if compiling:
                return self._mapped(ids, args, kwargs)
        return self._masked(ids, args, kwargs) if compiling else self._split(len(ids), args, kwargs)

    def _product(self, x: Tensor) -> Tensor:
        """x [rows, ..., D] through an nn.Linear for each example, whose rows are neighbours."""
        assert self.stack is not None
        ids = self.rows.ids
        t = {name: p[ids] for name, p in self.stack.tensors().items()}  # [examples, O, D], [examples, O]
        flat = x.reshape(len(ids), -1, x.shape[-1])
        w = t["weight"].transpose(1, 2)
        y = torch.baddbmm(t["bias"][:, None], flat, w) if "bias" in t else torch.bmm(flat, w)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _mapped(self, ids: Tensor, args: Any, kwargs: Any) -> Any:
        """One call that torch.func maps over the rows and their parameters."""
        assert self.stack is not None
        state = {name: p[ids] for name, p in self.stack.tensors().items()}
        leaves, spec = _pytree.tree_flatten((args, kwargs))
        with_rows = [isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == len(ids) for t in leaves]

        def one(state: dict[str, Tensor], *rows: Tensor) -> Any:
            given = iter(rows)
            row = [next(given)[None] if has else leaf for has, leaf in zip(with_rows, leaves)]
            a, k = _pytree.tree_unflatten(row, spec)
            return _pytree.tree_map(lambda t: t[0], torch.func.functional_call(self.like, state, a, k))

        rows = [leaf for has, leaf in zip(with_rows, leaves) if has]
        return torch.func.vmap(one, randomness="different")(state, *rows)

    def _masked(self, ids: Tensor, args: Any, kwargs: Any) -> Any:
        """Every copy on all rows, of which its own are taken."""
        y = self.base(*args, **kwargs)
        for entry in range(len(self.calls)):
            found = self._call(entry, args, kwargs)
            y = _pytree.tree_map(
                lambda a, b, entry=entry: torch.where(of_rows(ids == entry, a), *_same_width([a, b])), found, y
            )
        return y

    def _split(self, rows: int, args: Any, kwargs: Any) -> Any:
        """Every copy on its own rows."""
        parts = self.rows.parts(rows)
        if len(parts) == 1:
            return self._call(next(iter(parts)), args, kwargs)

        def take(t: Any, positions: Tensor) -> Any:
            has_rows = isinstance(t, Tensor) and t.dim() > 0 and t.shape[0] == rows
            return t.index_select(0, positions) if has_rows else t

        outputs = []
        for entry, positions in parts.items():
            a, k = _pytree.tree_map(lambda t, positions=positions: take(t, positions), (args, kwargs))
            outputs.append(self._call(entry, a, k))
        back = torch.cat(list(parts.values())).argsort()

        def join(*pieces: Any) -> Any:
            if not all(isinstance(piece, Tensor) for piece in pieces):
                return pieces[0]
            if any(t.dim() == 0 or len(t) != len(p) for t, p in zip(pieces, parts.values())):
                raise ValueError(
                    f"a task's own {type(self.like).__name__} returned a tensor of shape {tuple(pieces[0].shape)} for "
                    f"{len(next(iter(parts.values())))} rows, and the rows of several tasks cannot be put together"
                )
            return torch.cat(_same_width(list(pieces))).index_select(0, back)

        return _pytree.tree_map(join, *outputs)

    def _call(self, entry: int, args: Any, kwargs: Any) -> Any:
        if entry == self.without:
            return self.base(*args, **kwargs)
        call = self.calls[entry]
        if call is not None:
            return call(*args, **kwargs)
        assert self.state is not None
        return torch.func.functional_call(self.like, self.state(entry), args, kwargs)


def elements(module: nn.Module) -> int:
    return sum(t.numel() for t in state_of(module).values())


def _same_width(pieces: list[Tensor]) -> list[Tensor]:
    """The tensors with −inf up to the largest last dimension."""
    width = max(t.shape[-1] for t in pieces)
    return [
        t if t.shape[-1] == width else nn.functional.pad(t, (0, width - t.shape[-1]), value=float("-inf"))
        for t in pieces
    ]


class GroupedNorm(GroupedHead):
    """Copies that tasks have of a normalisation: x is normalised once, and its rows' own weights and biases follow.

    Normalisations of a class that does not allow that run as a `GroupedHead` does.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if self.stack is None or not isinstance(x, Tensor) or x.dim() < 2:
            return super().__call__(*args, **kwargs)
        norm: Any = self.like
        ids = self.rows.at(x)
        t = {name: p[ids] for name, p in self.stack.tensors().items()}
        if not t:
            return self.base(*args, **kwargs)
        dims = {name: p.dim() - 1 for name, p in t.items()}
        t = {n: p.reshape(len(ids), *[1] * (x.dim() - 1 - dims[n]), *p.shape[1:]) for n, p in t.items()}
        if is_layer_norm(norm):
            return _normed(nn.functional.layer_norm, x, (norm.normalized_shape, None, None, norm.eps), t)
        if type(norm) is nn.RMSNorm:
            eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
            return _normed(nn.functional.rms_norm, x, (norm.normalized_shape, None, eps), t)
        return torch.func.functional_call(norm, t, args, kwargs)


def is_layer_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm) and type(module).forward is nn.LayerNorm.forward


def norm_by_rows(module: nn.Module) -> bool:
    """Whether GroupedNorm computes a normalisation: whether weights of rows may stand in the place of its own."""
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    if is_layer_norm(module) or type(module) is nn.RMSNorm:
        return state_of(module).keys() <= {"weight", "bias"}
    if type(module) not in _broadcasts:
        _broadcasts[type(module)] = _tried(module)
    return _broadcasts[type(module)]


@torch.no_grad()
def _tried(module: nn.Module) -> bool:
    """Whether two rows with parameters of their own give what each of them gives alone."""
    state = state_of(module)
    shapes = {t.shape for t in state.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1 or "forward" in module.__dict__:
        return False
    (D,) = next(iter(shapes))
    x = torch.linspace(-2, 3, 6 * D, device="cpu").sin().view(2, 3, D)
    each = {name: torch.linspace(i, i + 1, 2 * D, device="cpu").cos().view(2, D) for i, name in enumerate(state)}
    try:
        with torch.autocast("cpu", enabled=False):
            y = torch.func.functional_call(module, {name: t[:, None] for name, t in each.items()}, (x,))
            alone = [
                torch.func.functional_call(module, {name: t[i] for name, t in each.items()}, (x[i : i + 1],))
                for i in range(2)
            ]
        return torch.allclose(y, torch.cat(alone), atol=1e-5)
    except Exception:  # whatever an unknown module raises for parameters of another shape
        return False


class TaskBatch:
    """The tasks of a batch's examples, for `Selection`, in the place of one Task.

    Args:
        layers: by name of the site, what runs there.
        copies: by path in the base.
        heads: those of the paths that are heads.
        tasks: the number of each example's task, −1 for the bare base.
        beams: how many rows `generate()` makes of each example.
        refusal: why the model cannot compute a loss itself, or None.
    """

    def __init__(
        self,
        layers: Mapping[str, Sequence[GroupedLayer]],
        copies: Mapping[str, GroupedHead],
        heads: tuple[str, ...],
        tasks: Sequence[int],
        beams: int = 1,
        refusal: str | None = None,
    ) -> None:
        made: dict[Any, Rows] = {}
        self.layer_at = {site: tuple(g.on(tasks, beams, made) for g in groups) for site, groups in layers.items()}
        self.copy_at = {path: group.on(tasks, beams, made) for path, group in copies.items()}
        self.heads, self.refusal = heads, refusal
        self.reads_input = any(group.reads_input for groups in self.layer_at.values() for group in groups)
        self.tasks, self.beams = tuple(tasks), beams
        self.count = len(self.tasks)

    def with_beams(self, beams: int) -> "TaskBatch":
        return TaskBatch(self.layer_at, self.copy_at, self.heads, self.tasks, beams, self.refusal)

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raises ValueError if a call of the model has inputs for another number of examples."""
        given = {**args[0], **kwargs} if args and isinstance(args[0], Mapping) else kwargs
        found = {name: given[name] for name in _INPUTS if isinstance(given.get(name), Tensor)}
        if args and isinstance(args[0], Tensor):
            found["the first argument"] = args[0]
        if not found:
            found = dict([(n, t) for n, t in given.items() if isinstance(t, Tensor) and t.dim() > 1][:1])
        for name, t in found.items():
            rows = t.shape[0] if t.dim() > 0 else 1
            if rows != self.count * self.beams:
                beams = f", of which generate() makes {self.count * self.beams} rows" if self.beams > 1 else ""
                raise ValueError(
                    f"{name} has a batch of {rows}, and tasks were given for {self.count} examples{beams}: give one "
                    "task, or None, for each example of the batch"
                )
        if self.refusal is not None and given.get("labels") is not None:
            raise ValueError(self.refusal)
