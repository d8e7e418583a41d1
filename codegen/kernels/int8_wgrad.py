"""The weight gradient of a convolution of 8-bit numbers.

    dw = H(g * grad_scale, x * input_scale)

with the integer product exact but for the rounding of sums over thousands of pixels to float32.
Contracted are output pixels, four at a time. For a chunk of pixels, g is packed once, and one
panel after the other of up to 64 columns of x: within a row of the kernel, taps and channels of
x's bordered pixels are one contiguous run of columns, which all rows of the kernel share. Then
tiles of output channels by columns stay in registers while the chunk's pixels are run through.
x is read as unsigned bytes, value + 128: the 128 times the sum of g is what the sums start from.
The order of additions depends on nothing but the shapes.
"""

import math
from typing import Any

import torch
from torch import Tensor

from codegen import cpp, int8, int8_panels, int8_wgrad_amx, int8_wgrad_vnni
from codegen.gpu.int8 import weight_gradient_program as emit_triton
from codegen.kernel import Kernel, Sample, Source, register

# Quadruples of pixels in a chunk: a panel, 32 KB, stays in the L1 cache; more where dw is large.
_QUADS, _QUADS_LARGE, _LARGE_BYTES = 128, 512, 512 * 1024
# Of small images, tiles contract borders too: beyond so many times the pixels, vectors are faster.
_MOST_IN_TILES = 3
# Packed g may take this much of the L2 cache.
_GRAD_BYTES = 1 << 20


def reference(
    grad: Tensor,
    x: Tensor,
    grad_scale: Tensor,
    input_scale: Tensor,
    out_size: list[int],
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """Return the weight gradient.

    Args:
        grad: g [B, Co, OH, OW] in the layout of `codegen.int8`, with `grad_border`.
        x: [B, Ci, IH, IW] in that layout, with `input_border`.
        grad_scale: float, 0-d: what one step of `grad` is worth.
        input_scale: the same of `x`.
        out_size: [B, Co, OH, OW].
        size: [B, Ci, IH, IW].
        kernel: the kernel's spatial sizes.
        stride: one number a spatial axis.
        padding: one number a spatial axis.
        dilation: one number a spatial axis.
        groups: groups of channels.
        channels_last: memory format of the result.

    Returns:
        dw [Co, Ci/groups, *kernel], of the scales' type.
    """
    wide = grad_scale.dtype
    axes = kernel, stride, padding, dilation
    g = int8.from_bytes(grad, out_size, *int8.grad_border(size[2:], out_size[2:], *axes), wide)
    values = int8.from_bytes(x, size, *int8.input_border(size[2:], out_size[2:], *axes), wide)
    scales = grad_scale, input_scale
    result = fake(grad, x, *scales, out_size, size, *axes, groups, channels_last)
    dw: Tensor = torch.ops.aten.convolution_backward(
        g, values, torch.empty_like(result), None, stride, padding, dilation, False, [0, 0], groups,
        [False, True, False],
    )[1]  # fmt: skip
    return result.copy_(dw * grad_scale * input_scale)


def fake(
    grad: Tensor,
    x: Tensor,
    grad_scale: Tensor,
    input_scale: Tensor,
    out_size: list[int],
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """Return an uninitialised weight gradient."""
    del x, input_scale, stride, padding, dilation
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (out_size[1], size[1] // groups, *kernel)
    return torch.empty(shape, dtype=grad_scale.dtype, device=grad.device, memory_format=layout)


def emit_cpp(
    grad: Tensor,
    x: Tensor,
    grad_scale: Tensor,
    input_scale: Tensor,
    out_size: list[int],
    size: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    channels_last: bool,
) -> Source | str:
    """Return the source for convolutions of two spatial axes."""
    del grad, x
    if (reason := int8.unsupported()) is not None:
        return reason
    if not grad_scale.dtype == input_scale.dtype == torch.float32:
        return "the scales are no float32"
    axes = kernel, stride, padding, dilation
    grad_border = int8.grad_border(size[2:], out_size[2:], *axes)
    batch, out_height, out_width, out_channels = int8.padded(out_size, [0, 0], [0, 0])
    _, grad_height, grad_width, _ = int8.padded(out_size, *grad_border)
    input_border = int8.input_border(size[2:], out_size[2:], *axes)
    _, height, width, channels = int8.padded(size, *input_border)
    if kernel == [1, 1] and (out_height, out_width) == (grad_height, grad_width) == (height, width):
        # All pixels of all images are one row.
        out_width = grad_width = width = batch * height * width
        batch = out_height = grad_height = height = 1
    # Within a row of the kernel, taps and channels are contiguous; else every tap is for itself.
    wide = dilation[1] == 1 and groups == 1
    segments, length = (1, kernel[1] * channels) if wide else (kernel[1], channels // groups)
    panels = segments * -(-length // 64)
    dw_bytes = groups * kernel[0] * panels * (out_channels // groups) * 256
    images, rows, columns, block = _chunk(
        (out_height, out_width, out_channels // groups),
        _QUADS if dw_bytes <= _LARGE_BYTES and not int8.in_tiles() else _QUADS_LARGE,
        (kernel[0] - 1) * dilation[0] // stride[0],
    )
    tiled = int8.in_tiles() and 4 * block <= _MOST_IN_TILES * images * rows * columns
    if not tiled:
        block = images * rows * -(-columns // 4)
    chunks = -(-batch // images) * -(-out_height // rows) * -(-out_width // columns)
    shares = int8_panels.cut(dw_bytes, chunks, groups * panels)
    blocks = -(-(out_channels // groups) // 16)
    # What several tasks need is packed once; a vector of 64 bytes has 4 pixels of 16 channels.
    grad_bytes = groups * chunks * blocks * (block + 1) * 64 if shares["PARTS"] > 1 else 0
    constants: dict[str, Any] = {
        "B": batch, "CO": out_channels, "CI": channels, "GROUPS": groups,
        "OH": out_height, "OW": out_width, "GHP": grad_height, "GWP": grad_width,
        "TOP": grad_border[0][0], "LEFT": grad_border[0][1], "XHP": height, "XWP": width,
        "KH": kernel[0], "KW": kernel[1], "SH": stride[0], "SW": stride[1],
        "DH": dilation[0], "DW": dilation[1], "SEGMENTS": segments, "LENGTH": length,
        "IMAGES": images, "ROWS": rows, "COLUMNS": columns, "BLOCK": block, **shares,
        "CHANNELS_LAST": channels_last,
    }  # fmt: skip
    inner = int8_wgrad_amx.BODY if tiled else int8_wgrad_vnni.BODY
    body = (
        int8.INTERLEAVE + int8_panels.HEAD + _CHUNKS + inner + _INPUT + int8_panels.REST + _KERNEL
    )
    return Source(cpp.source(constants, body), shares["SPLITS"] * dw_bytes + grad_bytes)


def _chunk(size: tuple[int, int, int], quads: int, border: int) -> tuple[int, int, int, int]:
    """Return what is packed together: images, rows of each, pixels of each row, and quadruples.

    Args:
        size: height, width and channels of g.
        quads: quadruples of pixels that a chunk should have.
        border: rows of x between one image's rows and the next one's, which steps of 16 quadruples
            (those that the last number counts) run over.
    """
    height, width, channels = size
    quads = max(16, min(quads, _GRAD_BYTES // (16 * -(-channels // 4))))
    row = -(-width // 4)
    if row > quads:
        images, rows, columns = 1, 1, 4 * quads
    elif row * height > quads:
        images, rows, columns = 1, quads // row, width
    else:
        images, rows, columns = quads // (row * height), height, width
    row = -(-columns // 4)
    block = ((images - 1) * (rows + border) + rows) * row
    return images, rows, columns, -(-block // 16) * 16


_CHUNKS = r"""
// Quadruples of pixels in a row, an image and a chunk.
constexpr long QUADS = (COLUMNS + 3) / 4, IMAGE = ROWS * QUADS, CHUNK = IMAGES * IMAGE;
// Rows of x that an image of a chunk looks at, apart by their phase of the stride.
constexpr long SLOTS = ROWS + (KH - 1) * DH / SH;
constexpr long BANDS = (OH + ROWS - 1) / ROWS, STRIPS = (OW + COLUMNS - 1) / COLUMNS;
constexpr long CHUNKS = (B + IMAGES - 1) / IMAGES * BANDS * STRIPS;

struct Pixels {};
struct Chunk {
  long image, row, column, images, rows, columns, quads;
  Chunk(Pixels, long i) {
    image = i / STRIPS / BANDS * IMAGES, row = i / STRIPS % BANDS * ROWS;
    column = i % STRIPS * COLUMNS;
    images = std::min(IMAGES, B - image), rows = std::min(ROWS, OH - row);
    columns = std::min(COLUMNS, OW - column), quads = (columns + 3) / 4;
  }
};

// Quadruple `q` of row `h` of image `b` of a chunk: four pixels of 16 channels.
static inline __m512i pixels_of(const uint8_t* grad, const Chunk& chunk, long b, long h, long q) {
  const uint8_t* rows[4];
  const uint8_t* first = grad + (((chunk.image + b) * GHP + TOP + chunk.row + h) * GWP + LEFT
                                 + chunk.column + 4 * q) * CO;
  for (long i = 0; i < 4; i++) rows[i] = 4 * q + i < chunk.columns ? first + i * CO : ZEROS;
  return _mm512_xor_si512(interleave16(rows), _mm512_set1_epi8(char(0x80)));
}
"""

_INPUT = r"""
// [phase][image][slot][quad][64][4]; a product may read beyond, where g is 0.
constexpr long PANEL_BYTES = (SH * IMAGES * SLOTS * QUADS + 16) * 256;
static inline long segment_at(long segment) { return segment * DW; }

template <long N>
static void pack_input(const uint8_t* x, const Chunk& chunk, uint8_t* into) {
  for (long b = 0; b < chunk.images; b++)
    for (long phase = 0; phase < SH; phase++)
      for (long slot = 0; slot < SLOTS; slot++) {
        long h = slot * SH + phase;
        if (h > (chunk.rows - 1) * SH + (KH - 1) * DH) continue;
        const uint8_t* row = x + ((chunk.image + b) * XHP + chunk.row * SH + h) * XWP * CI;
        uint8_t* to = into + ((phase * IMAGES + b) * SLOTS + slot) * QUADS * 64 * N;
        for (long q = 0; q < chunk.quads; q++, to += 64 * N) {
          const uint8_t* rows[4];
          for (long i = 0; i < 4; i++) {
            // Past the row's end g is 0: any pixel will do.
            long w = chunk.column + std::min(4 * q + i, chunk.columns - 1);
            rows[i] = row + w * SW * CI;
          }
          pack_pixels<N>(rows, to);
        }
      }
}
"""

_KERNEL = r"""
static void kernel(void* const* t) {
  const uint8_t* grad = static_cast<const uint8_t*>(t[0]);
  const uint8_t* x = static_cast<const uint8_t*>(t[1]);
  float grad_scale = *static_cast<const float*>(t[2]);
  float input_scale = *static_cast<const float*>(t[3]);
  float* out = static_cast<float*>(t[4]);
  float* sums = static_cast<float*>(t[5]);
  accumulate_all(grad, x, Pixels{}, sums);
  finish_all(sums, grad_scale, input_scale, out, [](long, float*) {});
}
"""


def _sample(*problem: Any, channels_last: bool = True, scale: float = 0.01) -> Sample:
    example = int8.Example(*problem)

    def args() -> tuple[Any, ...]:
        grad, x, _ = example.operands()
        scales = torch.tensor(scale), torch.tensor(0.5)
        return grad, x, *scales, *example.sizes(), channels_last

    return Sample(args, length=example.batch * math.prod(example.axes[0]))


def samples() -> tuple[Sample, ...]:
    """Return convolutions of every geometry, both layouts, odd sizes, and NaN."""
    return (
        _sample(3, (17, 19), (9, 7), (3, 3), (1, 1, 1, 1)),
        _sample(2, (1, 1), (5, 5), (1, 1)),
        _sample(1, (3, 63), (9, 8), (5, 5), (2, 2, 1, 1)),
        _sample(2, (63, 3), (16, 15), (3, 3), (2, 1, 1, 1)),
        _sample(2, (6, 4), (11, 10), (3, 2), (2, 3, 2, 2), channels_last=False),
        _sample(2, (8, 8), (9, 9), (7, 7), (1, 3, 1, 8)),
        _sample(2, (64, 32), (33, 34), (3, 3), (1, 1, 1, 1), channels_last=False),
        _sample(40, (80, 16), (4, 4), (3, 3), (1, 1, 1, 1)),
        _sample(1, (100, 36), (1, 705), (1, 1)),
        _sample(2, (8, 8), (6, 6), (1, 1), (2, 1, 1, 1)),
        _sample(2, (8, 8), (6, 6), (1, 1), (3, 0, 1, 1)),
        _sample(2, (8, 8), (5, 600), (2, 3), (1, 1, 2, 1)),
        _sample(2, (8, 8), (5, 5), (3, 3), (1, 1, 1, 1), scale=float("nan")),
        _sample(2, (8, 8), (5, 5), (3, 3), (1, 1, 1, 1), scale=float("inf")),
    )


register(
    Kernel(
        name="int8_wgrad",
        schema="(Tensor grad, Tensor x, Tensor grad_scale, Tensor input_scale, "
        "int[] out_size, int[] size, int[] kernel, int[] stride, int[] padding, int[] dilation, "
        "int groups, bool channels_last) -> Tensor",
        reference=reference,
        fake=fake,
        emit_cpp=emit_cpp,
        samples=samples,
        emit_triton=emit_triton,
    )
)
