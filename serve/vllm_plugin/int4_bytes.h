// What int4_bytes.cpp, which cuts an INT4 layer into tasks, shares with the products of one instruction set each.
//
// Weights are 4-bit in memory, in panels of 16 outputs. 8 inputs of a panel are 64 bytes: byte 4 o + j holds output o's input j in
// its low nibble and input j + 4 in its high nibble. So a load, a mask and a shift give two rows of 64 bytes, 4 inputs of 16
// outputs each, which is what vpdpbusd and the tiles of AMX multiply. A weight minus its zero point fits a signed byte.
//
// Activations are integers with a step for each row and chunk of inputs, as one byte or as two signed digits,
// high * 256 + low. A row of digits is one row of a product: "lines" are rows times digits.

#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>

#if defined(__clang__) || __GNUC__ >= 11
#define HAS_AMX
#endif

namespace qembed {

constexpr int PANEL = 16;       // outputs
constexpr int GANG = 4;         // panels that are multiplied at once
constexpr int LINES = 32;       // lines whose bytes of one chunk lie together: the two tiles of activations
constexpr int MAX_CHUNK = 128;  // inputs
constexpr int MAX_ROWS = 128;   // rows that share one unpacking of a chunk of weights

// One chunk of inputs, for the rows of a block and up to GANG panels.
struct Chunk {
    const uint8_t *lines;       // [blocks of LINES lines][tiles][LINES][tile_inputs]
    const float *steps;         // [rows]
    const int8_t *weights;      // [panels][inputs / 4][PANEL * 4], zero points subtracted
    const int32_t *offsets;     // [panels][PANEL]: added to each sum
    const float *scales;        // [panels][PANEL]
    float *sums;                // [rows][GANG * PANEL]
    int rows, panels, inputs, tiles, tile_inputs;
};

typedef void (*Multiply)(const Chunk &);

// Adds the products of a chunk to its sums. Digits 1 or 2. Both functions give the same bits.
// multiply_vnni takes lines plus 128, and so offsets of -128 (or -128 * 257) times the sum of the weights.
Multiply multiply_vnni(int digits);
Multiply multiply_amx(int digits);

// Configures this thread's tiles for chunks of `inputs`, and releases them.
void begin_amx(int tile_inputs);
void end_amx();

}  // namespace qembed

#endif
