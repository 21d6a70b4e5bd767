"""AdapterHub's head files: a head_config.json and the weights of a prediction head, beside an adapter's own files.

AdapterHub has two kinds of heads. A static one is that of a transformers class, such as BertForSequenceClassification,
and its weights have the names of that class. A flexible one, of AdapterHub's own classes such as BertAdapterModel, is
described by a config. A task takes either, as its own copy of the modules of the model's head, if it then computes the
same.
"""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...models.building import labels_of, take_labels
from ...models.parameters import Task
from ...models.sharding import full
from ...models.sites import Site, find_bodies, find_heads
from ...models.strict_json import check, parse, short
from .weights import check_tensor, read_tensors

CONFIG_FILE, WEIGHTS_FILE, SAFE_WEIGHTS_FILE = "head_config.json", "pytorch_model_head.bin", "model_head.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE, SAFE_WEIGHTS_FILE)

_WITHOUT = "with_head=False loads the adapter alone"
# Patterns for `strict_json.check`.
_FIELDS = {"model_class": str, "model_type": str, "config": (dict, None)}
_FLEXIBLE = {"head_type": str, "layers": int}
_LABELS = {str: int}


class Chain(NamedTuple):
    """What a transformers class computes on top of its base, as a flexible head of AdapterHub's.

    That is the linear layers at these paths, with the activation between them. It reads the base's pooled output, or
    its last hidden state: of the first token for classes, and of every token for tags and answers.
    """

    types: tuple[str, ...]
    linears: tuple[str, ...]
    activation: str | None = None
    use_pooler: bool = False


_CLASSES, _TAGS, _ANSWERS = ("classification", "multilabel_classification"), ("tagging",), ("question_answering",)
_CHOICES = ("multiple_choice",)


def _pooled(types: tuple[str, ...], pooler: str) -> tuple[Chain, ...]:
    """A classifier of the pooled output. With a pooler of the task's own it is also AdapterHub's default head."""
    return Chain(types, ("classifier",), use_pooler=True), Chain(types, (pooler, "classifier"), "tanh")


# By class; the tests hold every entry against the package. Classes of decoders are not here: which token AdapterHub's
# flexible heads read differs from what transformers reads where a batch is padded on the left.
CHAINS: dict[str, tuple[Chain, ...]] = {
    "BertForSequenceClassification": _pooled(_CLASSES, "bert.pooler.dense"),
    "BertForMultipleChoice": _pooled(_CHOICES, "bert.pooler.dense"),
    "RobertaForMultipleChoice": _pooled(_CHOICES, "roberta.pooler.dense"),
    "XLMRobertaForMultipleChoice": _pooled(_CHOICES, "roberta.pooler.dense"),
    "RobertaForSequenceClassification": (Chain(_CLASSES, ("classifier.dense", "classifier.out_proj"), "tanh"),),
    "XLMRobertaForSequenceClassification": (Chain(_CLASSES, ("classifier.dense", "classifier.out_proj"), "tanh"),),
    "ElectraForSequenceClassification": (Chain(_CLASSES, ("classifier.dense", "classifier.out_proj"), "gelu"),),
    "DebertaV2ForSequenceClassification": (Chain(_CLASSES, ("pooler.dense", "classifier"), "pooler_hidden_act"),),
    "DistilBertForSequenceClassification": (Chain(_CLASSES, ("pre_classifier", "classifier"), "relu"),),
    **{
        f"{family}For{task}": (Chain(types, linears),)
        for family in ("Bert", "Roberta", "XLMRoberta", "Electra", "DebertaV2", "DistilBert")
        for task, types, linears in (
            ("TokenClassification", _TAGS, ("classifier",)),
            ("QuestionAnswering", _ANSWERS, ("qa_outputs",)),
        )
    },
}


class Head(NamedTuple):
    """A head as the model that takes it has it."""

    modules: tuple[str, ...]  # paths of the modules that become the task's own
    tensors: dict[str, Tensor]  # by the modules' names in the model
    labels: dict[str, Any] | None  # as the header of a saved task has them
    file: Path  # of the weights, for messages


def read(
    folder: Path, root: nn.Module, sites: list[Site], text: bytes | None, file: Path, data: bytes | None
) -> Head | None:
    """The head in a folder of AdapterHub's, for a model; None, with a warning, where the model is a bare base.

    Args:
        folder: for messages.
        root: the transformers model that takes the adapter.
        sites: of the adapter.
        text: the content of head_config.json; None where the folder has none.
        file: the path of the weights.
        data: their content; None where the folder has none.

    Raises:
        ValueError: files that cannot be read, or a head that the model's own modules cannot compute.
    """
    if text is None:
        raise ValueError(f"{folder} has {file.name} and no {CONFIG_FILE}, which says what head it is: {_WITHOUT}")
    if data is None:
        raise ValueError(f"{folder} has {CONFIG_FILE} and no {SAFE_WEIGHTS_FILE} or {WEIGHTS_FILE}: {_WITHOUT}")
    what = f"{folder / CONFIG_FILE} is no head's config"
    info: dict[str, Any] = parse(text, f"{what}: it")
    check(info, _FIELDS, f"{what}: it")
    kind = type(root).__name__
    if find_bodies(root, sites) == [""]:
        warnings.warn(
            f"{folder} has a head of class {info['model_class']}, and the model, a {kind}, has none, so the adapter is "
            f"loaded without it. {_WITHOUT}, and without this warning",
            stacklevel=3,
        )
        return None
    config: Any = root.config
    for key in ("model_type", "hidden_size"):
        if info.get(key) is not None and info[key] != getattr(config, key, None):
            raise ValueError(
                f"the head in {folder} is for {key} {info[key]!r}, the model has {getattr(config, key, None)!r}"
            )
    tensors = read_tensors(file, data)
    if info["config"] is not None:
        head = _flexible(folder, root, info, file, tensors)
    elif info["model_class"] == kind:
        head = _static(folder, root, sites, info, file, tensors)
    else:
        raise ValueError(
            f"the head in {folder} is of class {info['model_class']}, the model is a {kind}: load into a model of that "
            f"class, or {_WITHOUT}"
        )
    # A head whose outputs are no classes, such as a language model's, has no labels.
    return head if labels_of(root, map(root.get_submodule, head.modules)) is not None else head._replace(labels=None)


def _static(
    folder: Path, root: nn.Module, sites: list[Site], info: dict[str, Any], file: Path, tensors: dict[str, Tensor]
) -> Head:
    """The head of a file that a model of the same class wrote."""
    modules = tuple(find_heads(root, sites))
    own = {key: t for key, t in tensors.items() if key.startswith(tuple(f"{path}." for path in modules))}
    for key in sorted(tensors.keys() - own.keys()):  # in one order, since processes that share a model gather there
        there = _tensor_of(root, key)
        if there is None:
            raise ValueError(f"{file} has {key!r}, and no head of the {type(root).__name__} has it: {_WITHOUT}")
        check_tensor(f"{key!r} in {file}", tensors[key], tuple(there.shape))
        if there.is_meta or not torch.equal(tensors[key].to(there.dtype), full(there.detach()).cpu()):
            raise ValueError(
                f"{key!r} in {file} has other values than in the model, and cannot be a task's own there, since the "
                f"base has it too or it is in no module by itself: {_WITHOUT}"
            )
    return Head(modules, own, _labels(folder, root, info, None), file)


def _flexible(folder: Path, root: nn.Module, info: dict[str, Any], file: Path, tensors: dict[str, Tensor]) -> Head:
    """The head of a file that one of AdapterHub's own classes wrote, under the names of the model's modules."""
    fields = {"use_pooler": False, "bias": True, "activation_function": "tanh", **info["config"]}
    check(info, {"name": str}, f"{folder / CONFIG_FILE}")
    check(fields, _FLEXIBLE, f"{folder / CONFIG_FILE}, field 'config'")
    chains = CHAINS.get(type(root).__name__, ())
    chain = next((chain for chain in chains if _computes(chain, root, fields)), None)
    if chain is None:
        known = " or ".join(_describe(*_of_chain(chain, root)) for chain in chains) or "no head that is known here"
        given = (fields["head_type"], fields["layers"], fields["activation_function"], fields["use_pooler"])
        bias = "" if fields["bias"] is True else f", bias={short(fields['bias'])}"
        raise ValueError(
            f"the head in {folder} is {_describe(*given)}{bias}, a {type(root).__name__} has {known}: run this head "
            f"with the package adapters, or {_WITHOUT}"
        )
    start = f"heads.{info['name']}"
    names = _names(start, chain)
    # AdapterHub also writes heads whose names only begin with this one's, and does not read them.
    found = {key for key in tensors if not key.startswith(start) or key.startswith(f"{start}.")}
    if surplus := sorted(found - names.keys()):
        raise ValueError(f"{file} has {len(surplus)} keys that do not belong, first {surplus[0]!r}")
    if missing := sorted(names.keys() - tensors.keys()):
        raise ValueError(f"{file} lacks {len(missing)} of {len(names)} keys, first {missing[0]!r}")
    problem = "multi_label_classification" if fields["head_type"] == "multilabel_classification" else None
    own = {ours: tensors[key] for key, ours in names.items()}
    return Head(chain.linears, own, _labels(folder, root, fields, problem), file)


def _names(start: str, chain: Chain) -> dict[str, str]:
    """The names of a chain's parameters in a flexible head → in the model."""
    # In front of each linear layer there is a dropout, and behind the first of two an activation.
    places = zip(chain.linears, (1, 4))
    return {f"{start}.{n}.{leaf}": f"{path}.{leaf}" for path, n in places for leaf in ("weight", "bias")}


def _computes(chain: Chain, root: nn.Module, fields: dict[str, Any]) -> bool:
    """Whether a flexible head of this config computes what a chain does."""
    types, layers, activation, use_pooler = _of_chain(chain, root)
    name = fields["activation_function"]
    return (
        fields["head_type"] in types
        and fields["layers"] == layers
        and (layers == 1 or (isinstance(name, str) and name.lower() == activation))
        and (types in (_TAGS, _ANSWERS) or fields["use_pooler"] is use_pooler)
        and fields["bias"] is True
    )


def _of_chain(chain: Chain, root: nn.Module) -> tuple[tuple[str, ...], int, str | None, bool]:
    config: Any = root.config
    activation = config.pooler_hidden_act if chain.activation == "pooler_hidden_act" else chain.activation
    return chain.types, len(chain.linears), activation, chain.use_pooler


def _describe(types: str | tuple[str, ...], layers: Any, activation: Any, use_pooler: Any) -> str:
    kind = types if isinstance(types, str) else types[0]
    between = f", activation_function={short(activation)}" if layers != 1 else ""
    return f"head_type={short(kind)}, layers={layers}{between}, use_pooler={short(use_pooler)}"


def _labels(folder: Path, root: nn.Module, info: dict[str, Any], problem: str | None) -> dict[str, Any]:
    """The labels of a config, as the header of a saved task has them."""
    where, ids = f"{folder / CONFIG_FILE}, field", info.get("label2id")
    check(ids, (_LABELS, None), f"{where} 'label2id'")
    config: Any = root.config
    count = info.get("num_labels") or len(ids or ()) or config.num_labels
    check(count, int, f"{where} 'num_labels'")
    names = {str(number): label for label, number in (ids or {}).items()}
    if names and names.keys() != {str(number) for number in range(min(count, len(names) + 1))}:
        warnings.warn(
            f"label2id in {folder / CONFIG_FILE} does not name the {count} outputs, so the task's labels have no names",
            stacklevel=5,
        )
        names = {}
    return {"num_labels": count, "id2label": names or None, "problem_type": problem}


def fill(task: Task, head: Head, root: nn.Module) -> None:
    """Gives a built task, which is not in the model yet, the weights and labels of a head.

    Raises ValueError where the head has other keys, shapes or dtypes than the task's copies of the modules.
    """
    new = take_labels(head.file.parent, root, task, head.labels)
    own = {
        f"{path}.{key}": t for path in head.modules for key, t in task.copy_at[path].state_dict(keep_vars=True).items()
    }
    if missing := sorted(own.keys() - head.tensors.keys()):
        raise ValueError(f"{head.file} lacks {len(missing)} of {len(own)} keys, first {missing[0]!r}")
    if surplus := sorted(head.tensors.keys() - own.keys()):
        raise ValueError(f"{head.file} has {len(surplus)} keys that do not belong, first {surplus[0]!r}")
    for key, t in own.items():
        check_tensor(f"{key!r} in {head.file}", head.tensors[key], tuple(t.shape))
    for layer, device in new:
        layer.to_empty(device=device)
    with torch.no_grad():
        for path in head.modules:
            for key, t in task.copy_at[path].state_dict(keep_vars=True).items():
                t.copy_(head.tensors[f"{path}.{key}"])


def write(
    root: nn.Module, task: Task, sites: list[Site], name: str, version: str
) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """What AdapterHub reads of a task's own modules: the fields of the config, the tensors, and the paths left out.

    Both are empty where there is no head to be written. A head with modules of the base, such as a pooler, is written
    as a flexible one, since AdapterHub's static heads hold nothing of the base.

    Args:
        root: the model.
        task: whose modules are written.
        sites: of the adapter.
        name: of the adapter in the folder.
        version: of AdapterHub's format.
    """
    config: Any = root.config
    bodies = find_bodies(root, sites)
    inside = [path for path in task.heads if any(f"{path}.".startswith(f"{body}.") for body in bodies)]
    if bodies == [""] or len(inside) == len(task.heads):
        return {}, {}, list(task.heads)
    labels = task.labels
    count = config.num_labels if labels is None else labels.num_labels
    names = config.id2label if labels is None else labels.id2label or {n: f"LABEL_{n}" for n in range(count)}
    info = {
        "hidden_size": config.hidden_size,
        "model_class": type(root).__name__,
        "model_name": getattr(config, "_name_or_path", ""),
        "model_type": config.model_type,
        "version": version,
    }
    label2id = {str(label): int(number) for number, label in names.items()}
    chains = CHAINS.get(type(root).__name__, ())
    chain = next((c for c in chains if set(c.linears) == set(task.heads) and c.types == _CLASSES), None)
    tensors: dict[str, Tensor]
    if inside and chain is not None:
        types, layers, activation, use_pooler = _of_chain(chain, root)
        several = labels is not None and labels.problem_type == "multi_label_classification"
        fields = {
            "activation_function": activation,
            "bias": True,
            "dropout_prob": None,
            "head_type": types[several],
            "label2id": label2id,
            "layers": layers,
            "num_labels": count,
            "use_pooler": use_pooler,
        }
        state = {f"{path}.{key}": t for path in task.heads for key, t in task.copy_at[path].named_parameters()}
        flexible = type(root).__name__.partition("For")[0] + "AdapterModel"
        tensors = {theirs: state[ours] for theirs, ours in _names(f"heads.{name}", chain).items()}
        return info | {"config": fields, "model_class": flexible, "name": name}, tensors, []
    tensors = {
        f"{path}.{key}": t
        for path in find_heads(root, sites)
        for key, t in root.get_submodule(path).state_dict(keep_vars=True).items()
    }
    for path in task.heads:
        if path not in inside:
            tensors |= {f"{path}.{key}": t for key, t in task.copy_at[path].state_dict(keep_vars=True).items()}
    return info | {"config": None, "label2id": label2id, "name": None, "num_labels": count}, tensors, inside


def _tensor_of(root: nn.Module, key: str) -> Tensor | None:
    """The parameter or buffer of a model under a key of its state dict."""
    path, _, leaf = key.rpartition(".")
    try:
        module = root.get_submodule(path)
    except AttributeError:
        return None
    t = module._parameters.get(leaf, module._buffers.get(leaf))
    return t if isinstance(t, Tensor) else None
