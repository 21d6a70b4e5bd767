"""Adapters inside a model: one frozen base, a small set of parameters for each task.

    add_adapter(model, "cola", AdapterConfig(bottleneck=64))    # frozen base, trainable task
    ...train as ever...
    with using_adapter(model, "cola"): ...                      # in this thread or async task alone
    set_active_adapter(model, None)                             # everywhere: the bare base, to the bit

Nothing of the base is replaced, renamed or changed. Hooks run the active task's adapters, and its own LayerNorms and
head run in place of the base's (see `hooks.py`). All of it hangs in one child of the model, named `adapter_ops`.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..wrappers import is_data_parallel, unwrap
from .adapters import LOCK, Adapters, adapters_of, find_adapters, root_of
from .batches import batch_of, names_of
from .building import attach, build, check_new, plan, preset
from .config import AdapterConfig, Preset
from .families import SitePattern
from .parameters import Labels, Task, key_of
from .sharding import reshard
from .sites import base_parameters, find_frozen, find_heads


def add_adapter(
    model: nn.Module,
    name: str,
    config: AdapterConfig | Preset = "houlsby",
    *,
    modules: Iterable[str] | None = None,
    sites: Mapping[str, str | SitePattern] | None = None,
) -> None:
    """Puts a new task's adapters into the model and makes it the one that trains (see `train_adapter`).

    The model's first task is to be added while no other thread calls the model; further ones may be at any time.

    Args:
        model: a transformers model of a family in `models.families.FAMILIES`, a module that contains one, or
            any module with `sites`; also as torch.compile, DistributedDataParallel, FSDP2 or PEFT return it.
        name: of the task; letters, digits, "-", "_" and ".".
        config: an AdapterConfig or the name of a preset: "houlsby", "pfeiffer", "parallel", "adapter_plus".
        modules: paths of further modules that belong to the task, such as its head; by default all that stand on top
            of the base model (see `models.sites.find_heads`). The task gets a copy of each.
        sites: see `find_sites`; the model's first adapter decides for all that follow.

    Raises:
        ValueError: a name that is taken or malformed, an unknown preset, model family or module, sites other than
            the first adapter's, a config that reads the sublayer's input where a site has no entry, a module that
            cannot be copied or trained, or an offloaded layer. The model is then as it was.

    Warns:
        UserWarning: parameters outside the base that belong to no head and so stay frozen, unless `modules` is given;
            a DistributedDataParallel wrapper, which does not know the new parameters.
    """
    with LOCK:
        insert(model, name, config, modules, sites)
        train_adapter(model, name)


def insert(
    model: nn.Module,
    name: str,
    config: AdapterConfig | Preset,
    modules: Iterable[str] | None = None,
    sites: Mapping[str, str | SitePattern] | None = None,
) -> None:
    """`add_adapter` without the last step: the task is there, inactive and frozen, and nothing else has changed."""
    with LOCK:
        config = preset(config)
        check_new(model, name)
        found = plan(model, config, sites)
        root = root_of(model)
        if modules is None:
            heads = find_heads(root, found)
            if frozen := find_frozen(root, found, heads):
                some = ", ".join(frozen[:4]) + (", …" if len(frozen) > 4 else "")
                warnings.warn(
                    f"{len(frozen)} parameters outside the base belong to no head and stay frozen: {some}. "
                    "modules= says which modules belong to the task",
                    stacklevel=3,
                )
        else:
            heads = [modules] if isinstance(modules, str) else list(modules)
        task = build(model, config, found, heads)
        attach(model, name, task, found, sites)


@contextlib.contextmanager
def using_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Within the context one task is active, or with None the bare base: in this thread or async task alone.

    Whatever is active elsewhere, and the model's default (`set_active_adapter`), stay as they are. Contexts nest, and
    one model may be in use with different tasks in many threads at once. New threads start with the default, and an
    async task that is created within the context has the task until the context ends, so await it there. With
    gradient checkpointing, run backward inside the context too, since it runs layers again. A generator that yields
    inside the context leaves it open in its caller until it goes on, as it would `torch.no_grad()`.

    Raises ValueError for an unknown name, before anything runs.

    >>> with using_adapter(model, "cola"):  # doctest: +SKIP
    ...     logits = model(**batch).logits
    """
    adapters = adapters_of(model, name)
    task = None if name is None else adapters.task(name)
    if task is not None:
        rebind(adapters, task, name)
    with adapters.selection.choose(True, task):
        yield


@contextlib.contextmanager
def using_adapters(model: nn.Module, names: Sequence[str | None] | Tensor) -> Iterator[None]:
    """Within the context each example of a batch runs its own task: in this thread or async task alone.

    Args:
        model: as in `using_adapter`.
        names: one for each example of the batch, in its order: the name of a task, or None for the bare base. Or a
            tensor of integers [examples]: the numbers of the tasks in the order of `list_adapters`, and -1 for the
            base. Its values are read once, when the context is entered.

    Raises:
        ValueError: an unknown name, or a number out of range, before anything runs; a call of the model whose batch is
            not of as many examples.
        TypeError: something else than a sequence or a tensor of integers.

    Each row has, to rounding, what `using_adapter` gives it alone: the adapters, LayerNorms and heads of its task. The
    adapters of one kind at one site are one call of `grouped_bottleneck_adapter`. Tasks may differ in every field of
    their configs; what differs in more than bottleneck, scale, init and sites runs as several such calls. The batch
    has to be the first dimension of what reaches the adapters. In `generate()` the rows of all beams and return
    sequences have the task of their example.

    Where heads differ in their number of outputs, rows are filled up with -inf to the largest number; a loss that the
    model computes itself is a ValueError then. With gradients enabled, the parameters of tasks that train are read in
    each call, so each task gets the gradients of its own rows (see `train_adapter`). Parameters that do not train are
    stacked once, when the context is entered: enter it again after they have changed.

    >>> with torch.no_grad(), using_adapters(model, ["cola", "sst2", None]):  # doctest: +SKIP
    ...     logits = model(**batch).logits  # of three examples
    """
    adapters = adapters_of(model)
    wanted = names_of(dict.fromkeys(adapters.names), names)
    tasks = {name: adapters.task(name) for name in dict.fromkeys(wanted) if name is not None}
    for name, task in tasks.items():
        rebind(adapters, task, name)
    batch = batch_of(adapters, [None if name is None else tasks[name] for name in wanted])
    with adapters.selection.choose(True, batch):
        yield


def rebind(adapters: Adapters, task: Task, name: str | None) -> None:
    """Makes sure that the task's copies run, also where a module of the base was replaced.

    Raises ValueError, with nothing changed, where the base has no such module any more.
    """
    for switch in adapters.switches_of(task):
        try:
            module = adapters.model.get_submodule(switch.path)
        except AttributeError:
            raise ValueError(
                f"the model has no module {switch.path!r} any more, of which the task {name!r} has its own"
            ) from None
        if switch.module is not module:
            with LOCK:
                adapters.switch(switch.path)


def set_active_adapter(model: nn.Module, name: str | None) -> None:
    """Makes one task the default, or, with None, the bare base: for every thread that is in no `using_adapter`.

    A call of the model that runs in another thread meanwhile ends with the task it began with. To serve several tasks
    at once use `using_adapter`. Raises ValueError for an unknown name.
    """
    adapters = adapters_of(model, name)
    task = None if name is None else adapters.task(name)
    if task is not None:
        rebind(adapters, task, name)
    adapters.selection.set_default(task)


def active_adapter(model: nn.Module) -> str | None:
    """The name of the task that a call of the model would run here and now; None for the bare base.

    Also None where the model has no adapters at all.
    """
    found = find_adapters(model)
    return None if found is None else found.name_of(found.selection.task())


class AdapterInfo(NamedTuple):
    """What a task was added with."""

    config: AdapterConfig
    modules: tuple[str, ...]  # paths of the modules, such as a head, of which it has its own
    norms: tuple[str, ...]  # paths of the normalisations of which it has its own
    labels: Labels | None  # what the classes of its head mean


def list_adapters(model: nn.Module) -> dict[str, AdapterInfo]:
    """The model's tasks by name, in the order they were added; empty where there are none."""
    found = find_adapters(model)
    if found is None:
        return {}
    tasks = {name: found.task(name) for name in found.names}
    return {name: AdapterInfo(t.config, t.heads, t.norms, t.labels) for name, t in tasks.items()}


def train_adapter(model: nn.Module, name: str | Sequence[str]) -> None:
    """Makes a task the default and its parameters, and no others, trainable: adapters, LayerNorms (unless the config
    freezes them) and head; everything else is frozen (paper §2).

    With a sequence of names all of these tasks train, and the bare base becomes the default: call the model within
    `using_adapters`, which says which example belongs to which task. Each task gets the gradients of its own rows, so
    a loss that is the sum of each task's mean trains all of them as they would train alone. An optimizer for each
    keeps their states apart. A task that no row has gets no gradients, and optimizers leave it as it is.

    >>> train_adapter(model, ["cola", "sst2"])  # doctest: +SKIP
    >>> with using_adapters(model, ["cola", "cola", "sst2"]):  # doctest: +SKIP
    ...     loss = cross_entropy(model(**batch).logits, labels, reduction="none")
    >>> (loss[:2].mean() + loss[2:].mean()).backward()  # doctest: +SKIP

    Raises ValueError for an unknown name. Warns where the model is wrapped in DistributedDataParallel, which
    synchronises the gradients of those parameters alone that trained when it was made, and where the model's first task
    was added to a part of it alone and parameters outside of that part train: no task has them, and they stay as they
    are.
    """
    names = [name] if isinstance(name, str) else list(name)
    if not names:
        raise ValueError("train_adapter was given no task, expected the name of one, or a sequence of names")
    adapters = adapters_of(model, names[0])
    for other in names[1:]:
        adapters_of(model, other)
    outer, inside = unwrap(model), {id(p) for _, p in base_parameters(adapters.model)}
    if outside := [n for n, p in base_parameters(outer) if p.requires_grad and id(p) not in inside]:
        warnings.warn(
            f"{len(outside)} parameters train that stand outside of the {type(adapters.model).__name__} to which the "
            f"first task was added, so they belong to no task and save_adapter does not write them: "
            f"{', '.join(outside[:4])}",
            stacklevel=2,
        )
    if is_data_parallel(model):
        warnings.warn(
            f"DistributedDataParallel does not synchronise parameters that were frozen when it was made: wrap the "
            f"model again before you train {', '.join(map(repr, names))}",
            stacklevel=2,
        )
    set_active_adapter(model, name if isinstance(name, str) else None)
    reshard(adapters.model)
    for _, parameter in base_parameters(adapters.model):
        parameter.requires_grad_(False)
    for other in adapters.names:
        adapters.task(other).freeze()
    for own in names:
        adapters.task(own).requires_grad_(True)


def delete_adapter(model: nn.Module, name: str) -> None:
    """Removes a task; with the last one, all that this library put into the model. What `train_adapter` froze stays
    frozen (`model.requires_grad_(True)`). A `using_adapter` that is open keeps the task until it ends, unless it was
    the model's last one: that is to be deleted while no other thread calls the model.

    Raises ValueError for an unknown name.
    """
    with LOCK:
        adapters = adapters_of(model, name)
        if adapters.selection.default is adapters.task(name):
            adapters.selection.set_default(None)
        del adapters.tasks[key_of(name)]
        if not len(adapters.tasks) and not adapters.serves_bank:
            adapters.detach()


@contextlib.contextmanager
def skip_layers(model: nn.Module, layers: Iterable[int]) -> Iterator[None]:
    """Within the context, the adapters of these layers are left out, trained as they are (paper §3.6, ablation).

    It holds for this thread or async task alone. Raises ValueError for a layer that the model does not have.
    """
    adapters = adapters_of(model)
    wanted, known = frozenset(layers), {site.layer for site in adapters.sites}
    if unknown := sorted(wanted - known):
        raise ValueError(f"the model has no layers {unknown}; it has {min(known)} to {max(known)}")
    with adapters.selection.choose(False, None, wanted):
        yield
