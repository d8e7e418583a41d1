"""Machines by their published figures, for those that nobody has measured yet.

Peaks are dense ones (half of what data sheets print for sparse operands), with float32 sums; that
of float32 is the vector units', as torch leaves TF32 off. Kernels are supposed to reach these
figures: an approximation then looks as good as its arithmetic, and no better.
"""

from collections.abc import Mapping
from types import MappingProxyType

from cost_model.hardware import Figure, Hardware

_H100 = "https://www.nvidia.com/en-us/data-center/h100/"
_H200 = "https://www.nvidia.com/en-us/data-center/h200/"
_A100 = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
)
_L40S = "https://www.nvidia.com/en-us/data-center/l40s/"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_MI300X = (
    "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/"
    "amd-instinct-mi300x-data-sheet.pdf"
)
# Data sheets do not say what a launch takes; this article measures 3.8 us a kernel where launches
# follow each other, of a kernel of 2.9 us.
_LAUNCH = Figure(0.9e-6, "https://developer.nvidia.com/blog/cuda-graphs/")


def _gpu(
    name: str, source: str, float32: float, bfloat16: float, int8: float, bandwidth: float
) -> Hardware:
    """Return the record of a GPU.

    Args:
        name: the machine.
        source: address of the data sheet.
        float32: TFLOP/s.
        bfloat16: TFLOP/s.
        int8: TOP/s.
        bandwidth: TB/s.
    """
    peaks = {"float32": float32, "bfloat16": bfloat16, "float16": bfloat16, "int8": int8}
    return Hardware(
        name,
        {dtype: Figure(1e12 * peak, source) for dtype, peak in peaks.items()},
        Figure(1e12 * bandwidth, source),
        _LAUNCH,
    )


_MEASURED = "measured on AMD EPYC (family 26, model 2) x 2, 2 threads, torch 2.13.0+cpu"
# A processor with AVX-512, VNNI and bfloat16 that was not measured itself.
_CPU = Hardware(
    "AVX-512 CPU",
    {
        "float32": Figure(506e9, _MEASURED),
        "bfloat16": Figure(927e9, _MEASURED),
        "int8": Figure(1725e9, _MEASURED),
    },
    Figure(76.3e9, _MEASURED),
    Figure(4.1e-6, _MEASURED),
)

DATASHEETS: Mapping[str, Hardware] = MappingProxyType(
    {
        machine.name: machine
        for machine in (
            _gpu("H100", _H100, 67, 989.5, 1979, 3.35),
            _gpu("H200", _H200, 67, 989.5, 1979, 4.8),
            _gpu("A100", _A100, 19.5, 312, 624, 2.039),
            _gpu("L40S", _L40S, 91.6, 362.05, 733, 0.864),
            _gpu("RTX 4090", _ADA, 82.6, 165.2, 660.6, 1.008),
            _gpu("MI300X", _MI300X, 163.4, 1307.4, 2614.9, 5.3),
            _CPU,
        )
    }
)
