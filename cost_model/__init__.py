"""What a tensor operation costs: FLOPs and bytes, as exact formulas in the tensors' shapes.

`Cost` is the record, `KernelCost` that of one kernel, and `seconds` what kernels take on a machine,
a `Hardware` record. The other functions build a cost from shapes whose dimensions are ints or sympy
expressions, so a formula written for a symbolic batch is evaluated once the batch is known.
"""

from cost_model.cost import Cost, Dim
from cost_model.datasheets import DATASHEETS
from cost_model.efficiency import EfficiencyTable, Estimate
from cost_model.figure import Figure
from cost_model.hardware import Hardware, seconds
from cost_model.kernel import KernelCost, counted_once, total
from cost_model.multiprocessors import Multiprocessors
from cost_model.ops import (
    ConvShape,
    Shape,
    attention,
    attention_backward,
    convolution,
    convolution_input_grad,
    convolution_weight_grad,
    element_count,
    elementwise,
    fill,
    gather,
    matmul,
    reduce,
)

__all__ = [
    "DATASHEETS",
    "ConvShape",
    "Cost",
    "Dim",
    "EfficiencyTable",
    "Estimate",
    "Figure",
    "Hardware",
    "KernelCost",
    "Multiprocessors",
    "Shape",
    "attention",
    "attention_backward",
    "convolution",
    "convolution_input_grad",
    "convolution_weight_grad",
    "counted_once",
    "element_count",
    "elementwise",
    "fill",
    "gather",
    "matmul",
    "reduce",
    "seconds",
    "total",
]
