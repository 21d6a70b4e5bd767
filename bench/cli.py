"""What the command lines of bench have in common: wrong input is one line on stderr and exit status 2, before any work.

The functions here are for `type=` of `add_argument`, or make one.
"""

import argparse
import contextlib
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .files import held

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        """Makes an OSError, RuntimeError or ValueError that is raised inside an error of this parser.

        Only reading and checking of input belongs inside: an error of the work itself keeps its traceback.
        """
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            self.error(str(error))

    @contextlib.contextmanager
    def holding(self, *paths: Path | None) -> Iterator[None]:
        """Keeps other runs from writing to these files and folders; where one does, that is an error of this parser."""
        with contextlib.ExitStack() as stack:
            with self.refusing():
                for path in paths:
                    if path is not None:
                        stack.enter_context(held(path))
            yield

    def add_list(
        self, name: str, parse: Callable[[str], Any], default: Iterable[object], help: str = "comma-separated"
    ) -> None:
        """Adds an option of values with commas between them, each parsed by `parse`."""
        text = ",".join(map(str, default))
        self.add_argument(name, type=listed(parse), default=text, help=f"{help} (default: %(default)s)")


def whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """Parses a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= int(text) <= most:
                return int(text)
        raise argparse.ArgumentTypeError(f"expected a whole number from {least}, found {text!r}")

    return parse


def positive(text: str) -> float:
    """Parses a finite number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")


def one_of(kind: str, names: Collection[str]) -> Callable[[str], str]:
    """Parses one of `names`; `kind` says in the error what they are."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"unknown {kind} {text!r}; known: {', '.join(names)}")
        return text

    return parse


def telling(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Parses by `parse`, and says what its ValueError says, which argparse would leave out."""

    def parse_and_tell(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_and_tell


def listed(parse: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Parses values with commas between them, each by `parse`."""
    return telling(lambda text: [parse(each) for each in text.split(",")])


def input_file(text: str) -> Path:
    """Parses the path of a file that can be read."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, found the folder {text!r}")
    if not path.exists():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    if not os.access(path, os.R_OK):
        raise argparse.ArgumentTypeError(f"the file {text!r} cannot be read: permission denied")
    return path


def output_file(text: str) -> Path:
    """Parses the path of a file that can be written; it and its folder need not be there yet."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file to write, found the folder {text!r}")
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"expected a file to write, found {text!r}, which is a device or a pipe")
    output_folder(str(path.parent))
    return path


def output_folder(text: str) -> Path:
    """Parses the path of a folder that can be written into; it need not be there yet."""
    path = Path(text)
    there = next(folder for folder in (path, *path.absolute().parents) if os.path.lexists(folder))
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder to write into, found the file {str(there)!r}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"the folder {str(there)!r} cannot be written into: permission denied")
    return path
