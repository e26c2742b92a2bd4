// GGML_OP_RAGGED_SELECT: which cells stay, where their scores are. CUDA and the emulator of the tests compile this text; Metal has no
// doubles and shares its memory with the host, which selects there.
//
// Nothing depends on the order in which threads run: sums are those of whole numbers, and a key of a window is computed by one thread,
// in the order that the host has (wkv-windows.cpp).
//
//   ragged-select-places.h   keys, and what they belong to
//   ragged-select-block.h    sums over a block, and the last key that is taken
//   ragged-select-steps.h    the kernels

#include "ragged-select-args.h"

#include "ragged-select-places.h"
#include "ragged-select-block.h"
#include "ragged-select-steps.h"
