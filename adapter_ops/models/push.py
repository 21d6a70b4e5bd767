"""Uploading one task of a model to the Hugging Face hub, and the model card that goes with it."""

import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from . import files
from .adapters import adapters_of
from .checkpoint import save_adapter
from .hub import huggingface_hub
from .sharding import of_writer, one_writer
from .sites import find_models
from .summary import TaskSize, adapter_summary

_CARD = "README.md"
_BASE_ID = re.compile(r"([A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)  # "user/name", or an old one, "gpt2"
_LABELS = 50  # the most that a card lists


def push_adapter(
    model: nn.Module,
    repo_id: str,
    name: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Uploads a task to the Hugging Face hub, where `load_adapter(model, "user/name")` finds it.

    The repository is made if it does not exist. It gets what `save_adapter` writes and a model card, in one commit. A
    card that it already has stays as it is, since somebody may have edited it. Log in before (`hf auth login`), or set
    the environment variable HF_TOKEN. Of the processes that share a sharded model all have to call this; the first one
    uploads.

    Args:
        model: as in `save_adapter`.
        repo_id: "user/name"; a "name" alone is a repository of the user who is logged in.
        name: of the task.
        private: whether a repository that is made is private. Default: what the account or organisation has set.
        revision: the branch to upload to, which is made if it does not exist. Default: "main".
        commit_message: of the commit. Default: one that names the task.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: an unknown name, a tensor that cannot be written, or a malformed repo_id. Nothing is uploaded then.
        ImportError: the package huggingface_hub is not installed.
        OSError: of huggingface_hub: not logged in, no right to write there, or no connection.

    >>> push_adapter(model, "user/bert-cola", "cola")  # doctest: +SKIP
    >>> load_adapter(fresh, "user/bert-cola")  # doctest: +SKIP
    """
    adapters = adapters_of(model, name)
    task, root = adapters.task(name), adapters.model
    library = huggingface_hub("to upload to the Hugging Face hub,")
    url = None
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder, name)
        size = next(size for size in adapter_summary(model).tasks if size.name == name)
        with one_writer(task) as writes:
            if writes:
                api = library.HfApi()
                repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                if revision is not None:
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
                header = _without_local_path(folder)
                if not api.file_exists(repo_id, _CARD, revision=revision):
                    text = card(root, header, size, repo_id, revision)
                    Path(folder, _CARD).write_text(text, encoding="utf-8")
                commit = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    revision=revision,
                    commit_message=commit_message or f"Upload the adapter {name}",
                )
                url = str(commit.commit_url)
    return of_writer(task, url)


def _without_local_path(folder: str) -> dict[str, Any]:
    """Takes the path of a local base out of a saved task, since it tells others nothing of use. Returns the header."""
    header, tensors = files.read(folder)
    name = header["base"]["name"]
    if name is not None and (not _BASE_ID.fullmatch(name) or Path(name).exists()):
        header = {**header, "base": {**header["base"], "name": None}}
        files.write(folder, header, tensors)
    return header


def card(root: nn.Module, header: dict[str, Any], size: TaskSize, repo_id: str, revision: str | None = None) -> str:
    """The model card of a task: a README.md with the metadata that the hub reads.

    Args:
        root: the model that has the task.
        header: of the saved task, whose base has the name of a repository or none.
        size: how many parameters the task has.
        repo_id: of the repository, for the code that loads it.
        revision: as `repo_id`; None is the branch "main".
    """
    base, labels = header["base"], header["labels"]
    base_id = base["name"]
    metadata = {
        "library_name": "adapter-ops",
        "tags": ["adapter", "adapter-ops", *([base["model_type"]] if base["model_type"] else [])],
        **({"base_model": base_id, "base_model_relation": "adapter"} if base_id else {}),
    }
    modules = ", ".join(_code(path) for path in header["modules"])
    kinds = (
        ("adapters", size.adapters),
        ("LayerNorms", size.norms),
        (f"other modules ({modules})" if modules else "other modules", size.modules),
        ("all", size.total),
    )
    share = size.share / size.total if size.total else 0.0  # of one parameter
    digest = f" (digest {_code(base['digest'][:12])})" if base["digest"] else ""
    base_text = _code(base_id) if base_id else f"a base model of type {_code(str(base['model_type']))}"
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in metadata.items()),  # JSON is YAML too
        "---",
        "",
        f"# {_text(header['name'])}",
        "",
        f"Bottleneck adapters ([Houlsby et al., 2019](https://arxiv.org/abs/1902.00751)) for {base_text}, saved with "
        f"adapter-ops {_text(header['library'])}.",
        "",
        "## How to load it",
        "",
        "```python",
        *_loading(root, base_id, labels, repo_id, revision),
        "```",
        "",
        "The outputs are those that the adapters were saved with if the base has the weights that they were trained "
        f"on{digest}; `load_adapter` warns where it has others.",
        "",
        "## Parameters",
        "",
        *_table(("", "parameters", "share of the base"), ((k, f"{n:,}", f"{n * share:.2%}") for k, n in kinds)),
        "",
        "## Config",
        "",
        *_table(("field", "value"), ((_code(k), _code(json.dumps(v))) for k, v in header["config"].items())),
    ]
    if labels is not None:
        named = sorted((labels["id2label"] or {}).items(), key=lambda item: int(item[0]))
        more = f" The first {_LABELS} of them:" if len(named) > _LABELS else ""
        lines += ["", "## Labels", "", f"{labels['num_labels']} outputs.{more}"]
        if named:
            lines += ["", *_table(("class", "label"), ((n, _code(label)) for n, label in named[:_LABELS]))]
    return "\n".join(lines) + "\n"


def _loading(
    root: nn.Module, base_id: str | None, labels: dict[str, Any] | None, repo_id: str, revision: str | None
) -> list[str]:
    """Lines of Python that load the task."""
    kind, at = type(root), "" if revision is None else f", revision={json.dumps(revision)}"
    lines = ["from adapter_ops import load_adapter"]
    if kind.__module__.startswith("transformers.") and hasattr(kind, "from_pretrained"):
        count = "" if labels is None else f", num_labels={labels['num_labels']}"
        path = json.dumps(base_id or "path/to/the/base/model")
        lines += [
            f"from transformers import {kind.__name__}",
            "",
            f"model = {kind.__name__}.from_pretrained({path}{count})",
        ]
    else:
        inside = ", ".join(type(inner).__name__ for inner in find_models(root).values())
        lines += ["", f"model = ...  # a {kind.__name__}" + (f" with a {inside} inside" if inside else "")]
    return [*lines, f"load_adapter(model, {json.dumps(repo_id)}{at})"]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = tuple(head)
    return [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)]


def _text(text: str) -> str:
    """A text as it is, also where it has characters that mean something in Markdown or HTML."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>#|!~$&])", r"\\\1", line)


def _code(text: str) -> str:
    """A text as code, also in a table."""
    line = " ".join(text.split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"
