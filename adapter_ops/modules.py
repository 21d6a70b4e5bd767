"""BottleneckAdapter: the adapter as a module."""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from .backend import Backend
from .functional import bottleneck_adapter, explain, finite_scale
from .kernels.activations import find_activation
from .ops import known
from .wrappers import loaded

# Modules that say by their class alone which activation they are: PyTorch's, and those of transformers.activations,
# which are known by name because transformers is not imported here.
_MODULES = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.Identity: "identity"}
_TRANSFORMERS = {
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLUActivation": "silu",
    "LinearActivation": "identity",
}


def activation_name(activation: str | nn.Module) -> str:
    """The name of an activation, which is given by name or as a module such as `nn.GELU()`.

    Raises ValueError if the name or the module is not known, or if the module has settings that no kernel has.
    """
    if not isinstance(activation, nn.Module):
        find_activation(activation)
        return activation
    kind, name = type(activation), None
    if kind is nn.GELU:
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(str(activation.approximate))
    elif kind is nn.LeakyReLU:
        name = "leaky_relu" if activation.negative_slope == 0.01 else None
    elif kind.__module__ == "transformers.activations":
        name = _TRANSFORMERS.get(kind.__name__)
    else:
        name = _MODULES.get(kind)
    if name is None:
        raise ValueError(
            f"no kernel for the activation {activation!r}; known: nn.GELU() and nn.GELU('tanh'), "
            f"nn.LeakyReLU() with its default slope, {', '.join(f'nn.{m.__name__}()' for m in _MODULES)}, "
            f"and {', '.join(_TRANSFORMERS)} of transformers"
        )
    return name


def _linear(name: str, layer: nn.Module | None) -> nn.Linear:
    """The layer itself. Raises TypeError if it does not compute what `nn.Linear` computes."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise TypeError(f"{name} is {type(layer).__name__}, expected torch.nn.Linear")
    return layer


class BottleneckAdapter(nn.Module):
    """x + scale · up(activation(down(x))), fused (Houlsby et al. 2019, §2.1).

    The state dict is that of two `nn.Linear`: `down.weight` [R, D], `down.bias` [R], `up.weight` [D, R], `up.bias` [D].
    Weights start as a truncated normal cut at two standard deviations and biases at zero, so that the module starts
    near the identity. `down` and `up` hold parameters only: they are not called, so hooks on them do not run, but for
    those with which accelerate loads parameters that it has offloaded.

    The logger "adapter_ops" says which backend runs, and why, once for each backend and all adapters of the same sizes,
    dtype and device: at WARNING where CUDA tensors fall back from the kernels, else at INFO. Set its level before the
    first call, since calls like one that was made before do not come to it.

    Args:
        hidden_size: D.
        bottleneck_size: R, at least 1.
        activation: a name that `bottleneck_adapter` knows, or a module such as `nn.GELU()`.
        bias: whether both projections have one.
        scale: a finite number, "learned" (a parameter [1]) or "channel" (a parameter [D]), both starting at 1.
        init_std: standard deviation of the weights before the cut; the paper's default 1e-2 (§3.6: up to 1e-2 all
            values do equally well).
        device, dtype: of the parameters.

    Raises:
        ValueError: a size under 1, an `init_std` that is not positive, an unknown activation or scale, a scale that is
            not finite.
        TypeError: a scale that is neither a number nor one of the two words.

    >>> adapter = BottleneckAdapter(768, 64)
    >>> adapter(torch.zeros(8, 128, 768)).shape
    torch.Size([8, 128, 768])
    """

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int,
        *,
        activation: str | nn.Module = "gelu",
        bias: bool = True,
        scale: float | Literal["learned", "channel"] = 1.0,
        init_std: float = 1e-2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or bottleneck_size < 1:
            raise ValueError(f"hidden_size {hidden_size} and bottleneck_size {bottleneck_size} must be at least 1")
        if not init_std > 0:
            raise ValueError(f"init_std is {init_std}, must be positive: at 0 no weight would ever get a gradient")
        if isinstance(scale, str) and scale not in ("learned", "channel"):
            raise ValueError(f"unknown scale {scale!r}; known: a number, 'learned', 'channel'")
        self.activation: str = activation_name(activation)
        self.init_std = init_std
        self.down: nn.Linear = nn.Linear(hidden_size, bottleneck_size, bias=bias, device=device, dtype=dtype)
        self.up: nn.Linear = nn.Linear(bottleneck_size, hidden_size, bias=bias, device=device, dtype=dtype)
        self.scale: float | Tensor
        if isinstance(scale, str):
            size = hidden_size if scale == "channel" else 1
            self.scale = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        else:
            self.scale = finite_scale(scale)
        self.reset_parameters()

    @overload
    @classmethod
    def from_linear(
        cls, down: nn.Sequential, *, scale: float | Literal["learned", "channel"] = ...
    ) -> "BottleneckAdapter": ...

    @overload
    @classmethod
    def from_linear(
        cls,
        down: nn.Linear,
        up: nn.Linear,
        *,
        activation: str | nn.Module,
        scale: float | Literal["learned", "channel"] = ...,
    ) -> "BottleneckAdapter": ...

    @classmethod
    def from_linear(
        cls,
        down: nn.Linear | nn.Sequential,
        up: nn.Linear | None = None,
        *,
        activation: str | nn.Module | None = None,
        scale: float | Literal["learned", "channel"] = 1.0,
    ) -> "BottleneckAdapter":
        """An adapter over two layers of an existing model; it shares their parameters and takes their place.

        Args:
            down, up: layers [D → R] and [R → D]; or, as `down` alone, an `nn.Sequential` of the first layer, the
                activation and the second layer.
            activation: what stands between the two layers, as a name or as the module itself, such as `nn.GELU()`. It
                has no default, because another activation than the model's would change its results without an error.
            scale: as above.

        Raises:
            ValueError: `up` does not undo `down`'s shape, or the activation or the scale is refused, or an
                `nn.Sequential` that consists of other modules.
            TypeError: a layer that computes something else than `nn.Linear` does, such as one of PEFT's, or two layers
                without an activation, or an `nn.Sequential` with one.

        >>> down, up = nn.Linear(768, 64), nn.Linear(64, 768)
        >>> BottleneckAdapter.from_linear(down, up, activation=nn.ReLU()).activation
        'relu'
        >>> BottleneckAdapter.from_linear(nn.Sequential(down, nn.GELU(), up)).activation
        'gelu'
        """
        layers: list[nn.Module | None] = [down, up]
        if isinstance(down, nn.Sequential):
            if up is not None or activation is not None:
                raise TypeError("from_linear got an nn.Sequential, which holds the activation and the second layer too")
            if len(down) != 3:
                raise ValueError(
                    "expected an nn.Sequential of nn.Linear, an activation and nn.Linear, got one of "
                    f"{', '.join(type(module).__name__ for module in down) or 'nothing'}"
                )
            activation, layers = down[1], [down[0], down[2]]
        first, second = _linear("down", layers[0]), _linear("up", layers[1])
        if activation is None:
            raise TypeError(
                "from_linear needs the activation between the two layers: activation=nn.GELU(), for example"
            )
        if (first.in_features, first.out_features) != (second.out_features, second.in_features):
            raise ValueError(
                f"down maps {first.in_features} to {first.out_features}, up maps {second.in_features} to "
                f"{second.out_features}"
            )
        adapter = cls(first.in_features, first.out_features, activation=activation, scale=scale, device="meta")
        if isinstance(adapter.scale, Tensor):
            adapter.scale = nn.Parameter(first.weight.new_ones(adapter.scale.shape))
        adapter.down, adapter.up = first, second
        return adapter

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Weights from the truncated normal, biases zero, a learned scale one."""
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=self.init_std, a=-2 * self.init_std, b=2 * self.init_std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if isinstance(self.scale, Tensor):
            nn.init.ones_(self.scale)

    if TYPE_CHECKING:  # nn.Module says that a call returns Any

        def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., D] → [..., D]; `residual` [..., D] takes the place of x in the sum."""
        modules = self._modules
        try:
            down, up = modules["down"]._parameters, modules["up"]._parameters  # type: ignore[union-attr]
            w_down: Any = down["weight"]
            b_down, w_up, b_up = down["bias"], up["weight"], up["bias"]
        except KeyError:  # parametrised, pruned, or another class in the place of nn.Linear
            return self._call(x, residual)
        y = known(x, residual, w_down, b_down, w_up, b_up, self.scale, self.activation)  # type: ignore[arg-type]
        return self._call(x, residual) if y is None else y

    def _call(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """`forward` where nothing is known of a call like this one."""
        down, up = self.down, self.up
        if down.weight.is_meta or up.weight.is_meta:
            with loaded((down, up)):
                return self._checked(x, residual)
        return self._checked(x, residual)

    def _checked(self, x: Tensor, residual: Tensor | None) -> Tensor:
        down, up = self.down, self.up
        weights = down.weight, down.bias, up.weight, up.bias
        return bottleneck_adapter(x, *weights, activation=self.activation, scale=self.scale, residual=residual)

    def explain(self, x: Tensor) -> Backend:
        """Which backend this module takes for x, why, and by which plan; see `adapter_ops.explain`."""
        down, up = self.down, self.up
        weights = down.weight, down.bias, up.weight, up.bias
        return explain(x, *weights, activation=self.activation, scale=self.scale)

    def extra_repr(self) -> str:
        scale = {1: "learned"}.get(self.scale.numel(), "channel") if isinstance(self.scale, Tensor) else self.scale
        return f"activation={self.activation}, scale={scale}"
