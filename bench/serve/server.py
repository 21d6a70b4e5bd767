"""One server of the load test: examples/serve.py with its own batches, or with one of the two alternatives in them.

All have the same queue, the same batches of texts and the same web layer. An alternative only runs a batch differently:
it calls a model once for each task of the batch.
"""

import copy
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapter_ops import AdapterBank, load_adapter, set_active_adapter

from .tasks import quiet

SCRIPT = Path(__file__).parents[2] / "examples" / "serve.py"


def example() -> Any:
    """The module examples/serve.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("serve", SCRIPT)
    assert spec is not None and spec.loader is not None
    sys.modules["serve"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


serve = example()
Tasks: Any = serve.Tasks


class PerTask(Tasks):
    """Runs the texts of one task after those of another."""

    def find(self) -> None:
        for path in sorted(self.folder.iterdir()):
            self.load(path.name, path.name, self.add)

    def add(self, bank: AdapterBank, key: str, folder: Path) -> None:
        """Loads a saved task. Each of the two ways below puts it somewhere else."""
        raise NotImplementedError

    def run(self, texts: Any) -> list[Any]:
        members: dict[str, list[int]] = {}
        for i, text in enumerate(texts):
            members.setdefault(text.task.key, []).append(i)
        found: list[Any] = [None] * len(texts)
        for mine in members.values():
            for i, answer in zip(mine, super().run([texts[i] for i in mine])):
                found[i] = answer
        return found


class Models(PerTask):
    """One model a task: a copy of the base, which has this task alone."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.models: dict[str, nn.Module] = {}

    def add(self, bank: AdapterBank, key: str, folder: Path) -> None:
        self.models[key] = copy.deepcopy(self.model)
        load_adapter(self.models[key], folder, key)
        self.models[key].eval()

    def logits(self, tasks: Any, batch: dict[str, Tensor]) -> Tensor:
        return self.models[tasks[0].key](**batch).logits  # type: ignore[no-any-return]


class Switch(PerTask):
    """One base with all tasks: set one active, run, set the next one, run."""

    def add(self, bank: AdapterBank, key: str, folder: Path) -> None:
        load_adapter(self.model, folder, key)
        self.model.eval()

    def logits(self, tasks: Any, batch: dict[str, Tensor]) -> Tensor:
        set_active_adapter(self.model, tasks[0].key)
        return self.model(**batch).logits  # type: ignore[no-any-return]


MODES = {"models": Models, "switch": Switch, "service": Tasks}


def main(argv: list[str]) -> None:
    mode, threads, *rest = argv
    quiet()
    torch.set_num_threads(int(threads))
    options = serve.parse(rest)
    tasks = MODES[mode](options.model, options.tasks, options.capacity, options.bottleneck)
    tasks.find()
    serve.serve(serve.create_app(tasks, options), options)


if __name__ == "__main__":
    main(sys.argv[1:])
