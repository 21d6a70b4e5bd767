"""The GPUs that kernels are compiled for, and how many programs of a kernel each holds at once."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

from adapter_ops.kernels.problem import Target
from bench.static.machine_code import Code

TENSOR_MEMORY = 512  # columns a multiprocessor, where there are any


@dataclass(frozen=True)
class Card:
    """One compute capability: its largest product, and what a multiprocessor holds. Shared memory is in bytes.

    `tensor_core` names the instructions of its generation. Registers are 32 bits, handed to a warp by the `granule`,
    from one of four equal files.
    """

    target: GPUTarget
    multiprocessors: int
    tensor_core: str
    shared_limit: int  # of a program
    shared: int  # of all programs, each with `reserved` on top
    warps: int
    programs: int
    registers: int = 65536
    granule: int = 256
    reserved: int = 1024

    @property
    def aim(self) -> Target:
        """What a plan for such a card takes, every form of it; there, ROCm's go with generation 8."""
        arch = self.target.arch
        capability = divmod(arch, 10) if isinstance(arch, int) else (8, 0)
        return Target(capability, self.multiprocessors, unmeasured=True)

    def resident(self, code: Code) -> int:
        """Programs that a multiprocessor holds at once; 0 if not even one fits."""
        registers = -(-code.registers * self.target.warp_size // self.granule) * self.granule
        fits = [
            self.programs,
            self.warps // code.warps,
            self.registers // 4 // registers * 4 // code.warps,
            self.shared // max(1, code.shared + self.reserved) if code.shared <= self.shared_limit else 0,
        ]
        if code.tensor_memory:
            fits.append(TENSOR_MEMORY // code.tensor_memory)
        return min(fits)


def _cuda(arch: int, *figures: int | str) -> Card:
    return Card(GPUTarget("cuda", arch, 32), *figures)  # type: ignore[arg-type]


# sm_*: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". gfx942: LLVM, "User Guide for
# AMDGPU Backend".
CARDS = {
    "sm_80": _cuda(80, 108, "HMMA", 163 << 10, 164 << 10, 64, 32),
    "sm_86": _cuda(86, 84, "HMMA", 99 << 10, 100 << 10, 48, 16),
    "sm_89": _cuda(89, 142, "HMMA", 99 << 10, 100 << 10, 48, 24),
    "sm_90": _cuda(90, 132, "HGMMA", 227 << 10, 228 << 10, 64, 32),
    "sm_100": _cuda(100, 148, "UTCHMMA", 227 << 10, 228 << 10, 64, 32),
    "sm_120": _cuda(120, 188, "HMMA", 99 << 10, 100 << 10, 48, 24),
    "gfx942": Card(GPUTarget("hip", "gfx942", 64), 304, "mfma", 64 << 10, 64 << 10, 32, 16, 131072, 512, 0),
}
