"""Checkpoints of Hugging Face's Trainer that hold what trains, and not the frozen base."""

import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import TrainerCallback

from ..models.adapters import adapters_of, find_adapters
from ..models.disk import replace_files
from ..models.sharding import full
from ..wrappers import unwrap

_WEIGHTS_FILE = "model.safetensors"  # Trainer's name for the weights of a checkpoint


class AdapterCallback(TrainerCallback):
    """Makes a Trainer's checkpoints hold the parameters that train and all buffers, and not the frozen base.

    A checkpoint has the files that Trainer gives it, with a `model.safetensors` that is as small as the task. Trainer
    resumes from such a checkpoint (`train(resume_from_checkpoint=True)`) and loads the best one at the end
    (`load_best_model_at_end=True`), as it does with whole ones: the model that it was given has the base. A model that
    is saved otherwise than as a checkpoint, by `trainer.save_model()` say, is saved whole. After the training,
    `adapter_ops.save_adapter` writes the task for other models.

    It is for a model with adapters of this library. A model that PEFT has wrapped is refused with a ValueError, since
    Trainer's checkpoints of it hold PEFT's parameters alone, and so is a model without adapters.

    >>> from transformers import Trainer
    >>> trainer = Trainer(model, arguments, callbacks=[AdapterCallback()])  # doctest: +SKIP
    """

    def __init__(self) -> None:
        self._attached: _Attached | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if find_adapters(model) is not None:  # else the task may be added before the training begins
            self._attach(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._attach(model)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        path = Path(args.output_dir, f"checkpoint-{state.global_step}", _WEIGHTS_FILE)
        if args.should_save and path.is_file() and self._attached is not None:
            self._attached.shrink(path)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._attached is not None:
            self._attached.remove()
        self._attached = None

    def _attach(self, model: nn.Module) -> None:
        adapters_of(model)
        if hasattr(model, "peft_config"):
            raise ValueError(
                f"{type(model).__name__} is wrapped by PEFT, so Trainer's checkpoints hold PEFT's parameters alone: "
                "train the task without PEFT's wrapper, or without AdapterCallback and with checkpoints of your own"
            )
        inner = unwrap(model)
        if self._attached is None or self._attached.model is not inner:
            if self._attached is not None:
                self._attached.remove()
            self._attached = _Attached(inner)


class _Attached:
    """What stands on the model while its checkpoints are small.

    It is called as the model's `save_pretrained`, which Trainer calls for the models of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        given = model.__dict__.get("save_pretrained")
        self.own: Any = given.own if isinstance(given, _Attached) else given  # that of a run that broke off is replaced
        if hasattr(model, "save_pretrained"):
            model.save_pretrained = self  # type: ignore[assignment]
        self.handle = model.register_load_state_dict_post_hook(self._after_load)

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        folder = Path(save_directory)
        if not re.fullmatch(r"checkpoint-\d+", folder.name):
            whole: Any = self.own or type(self.model).save_pretrained.__get__(self.model)  # type: ignore[attr-defined]
            return whole(save_directory, *args, **kwargs)
        state = kwargs.get("state_dict")
        if kwargs.get("is_main_process", True):
            self._write(folder, self.model.state_dict() if state is None else state)
            self.model.config.save_pretrained(folder)  # type: ignore[union-attr,operator]
        return None

    def shrink(self, path: Path) -> None:
        """Leaves the frozen base out of a file, for a model that is not of transformers, whose state dict it has."""
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            kept = names - self._frozen()
            if kept == names:
                return
            state = {name: file.get_tensor(name) for name in kept}
        self._write(path.parent, state)

    def remove(self) -> None:
        self.handle.remove()
        if self.model.__dict__.get("save_pretrained") is self:
            del self.model.save_pretrained
            if self.own is not None:
                self.model.save_pretrained = self.own

    def _write(self, folder: Path, state: dict[str, Tensor]) -> None:
        frozen = self._frozen()
        kept = {n: full(t.detach()).cpu().contiguous() for n, t in state.items() if _plain(n) not in frozen}
        replace_files(folder, {_WEIGHTS_FILE: save(kept, metadata={"format": "pt"})})

    def _frozen(self) -> set[str]:
        named = self.model.named_parameters(remove_duplicate=False)
        return {_plain(name) for name, parameter in named if not parameter.requires_grad}

    def _after_load(self, _: nn.Module, keys: Any) -> None:
        """Trainer warns of every key that a checkpoint lacks. One of ours lacks the frozen base, as it is to do."""
        if {_plain(name) for name in keys.missing_keys} == self._frozen():
            keys.missing_keys.clear()


def _plain(name: str) -> str:
    return name.removeprefix("_orig_mod.")
