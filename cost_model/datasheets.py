"""Machines by their published figures, for those that nobody has measured yet.

Peaks are dense ones (half of what data sheets print for sparse operands), with float32 sums; that
of float32 is the vector units', which torch computes with unless TF32 is allowed. Kernels are
supposed to reach these figures: an approximation then looks as good as its arithmetic, and no
better.
"""

from collections.abc import Mapping
from types import MappingProxyType

from cost_model.figure import Figure
from cost_model.hardware import Hardware
from cost_model.multiprocessors import Multiprocessors

_H100 = "https://www.nvidia.com/en-us/data-center/h100/"
_H200 = "https://www.nvidia.com/en-us/data-center/h200/"
_HOPPER = "https://developer.nvidia.com/blog/nvidia-hopper-architecture-in-depth/"
_A100 = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
)
_AMPERE = (
    "https://images.nvidia.com/aem-dam/en-zz/Solutions/data-center/"
    "nvidia-ampere-architecture-whitepaper.pdf"
)
_L40S = "https://www.nvidia.com/en-us/data-center/l40s/"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
_MI300X = (
    "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/data-sheets/"
    "amd-instinct-mi300x-data-sheet.pdf"
)
_CDNA3 = (
    "https://www.amd.com/content/dam/amd/en/documents/instinct-tech-docs/white-papers/"
    "amd-cdna-3-white-paper.pdf"
)
# Data sheets do not say what a launch takes; this article measures 3.8 us a kernel where launches
# follow each other, of a kernel of 2.9 us.
_LAUNCH = Figure(0.9e-6, "https://developer.nvidia.com/blog/cuda-graphs/")
# The white paper of an A100 has 5120 bytes a clock, at 1.41 GHz; of later ones none is published.
_LIKE_A100 = "assumed: 5120 bytes a clock, as an A100 reads, at the clock of the peaks"


def _gpu(
    name: str, source: str, bandwidth: float, units: Multiprocessors, **peaks: float
) -> Hardware:
    """Return the record of a GPU.

    Args:
        name: the machine.
        source: address of the data sheet.
        bandwidth: TB/s.
        units: its multiprocessors and its cache.
        **peaks: TFLOP/s or TOP/s, by element type.
    """
    peaks["float16"] = peaks["bfloat16"]
    return Hardware(
        name,
        {dtype: Figure(1e12 * peak, source) for dtype, peak in peaks.items()},
        Figure(1e12 * bandwidth, source),
        _LAUNCH,
        multiprocessors=units,
    )


def _units(
    count: int, megabytes: int, terabytes_per_s: float, source: str, rate_source: str
) -> Multiprocessors:
    return Multiprocessors(
        Figure(count, source),
        Figure(megabytes * 1e6, source),
        Figure(1e12 * terabytes_per_s, rate_source),
    )


_HOPPER_UNITS = _units(132, 50, 9.4, _HOPPER, _LIKE_A100)

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
            _gpu(
                "H100",
                _H100,
                3.35,
                _HOPPER_UNITS,
                float32=67,
                tf32=494.5,
                bfloat16=989.5,
                int8=1979,
                float8=1979,
            ),
            _gpu(
                "H200",
                _H200,
                4.8,
                _HOPPER_UNITS,
                float32=67,
                tf32=494.5,
                bfloat16=989.5,
                int8=1979,
                float8=1979,
            ),
            _gpu(
                "A100",
                _A100,
                2.039,
                _units(108, 40, 7.2, _AMPERE, _AMPERE),
                float32=19.5,
                tf32=156,
                bfloat16=312,
                int8=624,
            ),
            _gpu(
                "L40S",
                _L40S,
                0.864,
                _units(142, 96, 12.9, _ADA, _LIKE_A100),
                float32=91.6,
                tf32=183,
                bfloat16=362.05,
                int8=733,
                float8=733,
            ),
            _gpu(
                "RTX 4090",
                _ADA,
                1.008,
                _units(128, 72, 12.9, _ADA, _LIKE_A100),
                float32=82.6,
                tf32=82.6,
                bfloat16=165.2,
                int8=660.6,
                float8=330.3,
            ),
            _gpu(
                "MI300X",
                _MI300X,
                5.3,
                _units(304, 256, 17.2, _CDNA3, _CDNA3),
                float32=163.4,
                tf32=653.7,
                bfloat16=1307.4,
                int8=2614.9,
                float8=2614.9,
            ),
            _CPU,
        )
    }
)
