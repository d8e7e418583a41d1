"""What a tensor operation costs: FLOPs and bytes, as exact formulas in the tensors' shapes.

`Cost` is the record; the functions build one from shapes whose dimensions are ints or sympy
expressions, so a formula written for a symbolic batch is evaluated once the batch is known.
"""

from cost_model.cost import Cost, Dim
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
    "ConvShape",
    "Cost",
    "Dim",
    "Shape",
    "attention",
    "attention_backward",
    "convolution",
    "convolution_input_grad",
    "convolution_weight_grad",
    "element_count",
    "elementwise",
    "fill",
    "gather",
    "matmul",
    "reduce",
]
