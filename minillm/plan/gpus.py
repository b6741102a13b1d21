"""GPUs: their memory, their peak FLOP/s, and the 16-bit dtype that they multiply fast."""

from dataclasses import dataclass

from minillm import hardware
from minillm.errors import UserError

# What a process holds on a GPU besides tensors: a CUDA context with its kernels, the workspace of the matrix products,
# with several ranks NCCL's channels. An assumption, not a measurement.
CONTEXT = 1.0 * 2**30
# What the allocator loses in gaps between tensors, as a part of them. An assumption too.
GAPS = 0.05

# name: (the name in the table of peaks, memory in GiB as sold, whether bfloat16 is fast: capability 8.0 and newer)
_GPUS = {
    "T4": ("T4", 16, False), "V100-16": ("V100", 16, False), "V100-32": ("V100", 32, False),
    "3090": ("3090", 24, True), "4090": ("4090", 24, True), "A10": ("A10", 24, True), "L4": ("L4", 24, True),
    "A100-40": ("A100", 40, True), "L40S": ("L40S", 48, True), "A100-80": ("A100", 80, True),
    "H100": ("H100", 80, True), "H200": ("H200", 141, True),
}  # fmt: skip
# What a program finds of that is less: part of it is the driver's, and 141 GB are not GiB.
USABLE = 0.93


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One kind of GPU."""

    name: str
    memory: float
    """Bytes that a program finds."""
    half_peak: float
    """FLOP/s of dense 16-bit products (data sheet, ``minillm/hardware.py``)."""
    single_peak: float
    """FLOP/s of float32 products, TF32 off."""
    has_bfloat16: bool
    """Else --dtype auto means float16."""

    def dtype(self, wanted: str) -> str:
        """Return the dtype of products that ``--dtype`` means here."""
        return ("bfloat16" if self.has_bfloat16 else "float16") if wanted == "auto" else wanted

    def peak(self, dtype: str) -> float:
        """Return the FLOP/s of products in ``dtype``; where bfloat16 is emulated, those of float32."""
        return (
            self.single_peak
            if dtype == "float32" or (dtype == "bfloat16" and not self.has_bfloat16)
            else self.half_peak
        )

    def needed(self, tensors: float) -> float:
        """Return the bytes that a step with ``tensors`` bytes of tensors at its peak takes of the memory."""
        return tensors * (1 + GAPS) + CONTEXT


def known_gpus() -> list[str]:
    """Return the names."""
    return list(_GPUS)


def find_gpu(name: str) -> GPU:
    """Return the GPU of that name, upper or lower case.

    Raises:
        UserError: there is none; the message lists all.
    """
    for known, (key, gibibytes, has_bfloat16) in _GPUS.items():
        if known.lower() == name.lower():
            half, single = hardware.GPU_PEAKS[key]  # the one table of peaks
            return GPU(
                name=known,
                memory=gibibytes * 2**30 * USABLE,
                half_peak=half,
                single_peak=single,
                has_bfloat16=has_bfloat16,
            )
    raise UserError(f"--gpus {name}: choose from {', '.join(_GPUS)} (several with commas)")
