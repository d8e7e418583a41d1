"""Tile registers of x86 processors with AMX: eight of 16 rows by 64 bytes, and their product.

One instruction contracts 16 rows of 64 bytes with 16 columns of 64 bytes: 16384 products, where one
of VNNI has 64. The kernel's permission to use the registers is the process's, and asked for once.
"""

import subprocess
from pathlib import Path

import torch

# What a compiler defines that knows the instructions and was told that the processor has them.
_MACRO = "__AMX_INT8__"


def available(compiler: str, flags: tuple[str, ...], features: frozenset[str]) -> bool:
    """Return whether this process may multiply bytes in tiles, and the compiler knows how.

    Args:
        compiler: the program.
        flags: its arguments.
        features: names of what the processor has.
    """
    if not {"amx_tile", "amx_int8"} <= features:
        return False
    macros = [compiler, *flags, "-dM", "-E", "-x", "c++", str(Path("/dev/null"))]
    known = subprocess.run(macros, capture_output=True, text=True, check=False)
    return _MACRO in known.stdout and bool(torch.cpu._init_amx())


# GCC 12 does not say that loading a tile reads memory: what is to be read must be written before.
TILES = r"""
// All tile registers, whole, for as long as this lives.
struct Tiles {
  Tiles() {
    struct { uint8_t palette = 1, start = 0, none[14] = {}; uint16_t bytes[16] = {};
             uint8_t rows[16] = {}; } config;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    fence();
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  static void fence() { asm volatile("" ::: "memory"); }
};
"""
