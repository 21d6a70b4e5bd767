"""The sizes of one adapter call. Nothing here imports torch, which python -m bench host has to find unimported."""

from dataclasses import dataclass

SHAPES_HELP = "MxDxR, comma-separated"


@dataclass(frozen=True)
class Shape:
    """M tokens, hidden size D, bottleneck R."""

    M: int
    D: int
    R: int

    def __str__(self) -> str:
        return f"{self.M}x{self.D}x{self.R}"

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Shape.parse("4096x768x64"); ValueError for anything else."""
        sizes = text.split("x")
        if len(sizes) != 3 or not all(s.isdigit() and int(s) > 0 for s in sizes):
            raise ValueError(f"shape {text!r} is not of the form MxDxR, such as 4096x768x64")
        return cls(*map(int, sizes))
