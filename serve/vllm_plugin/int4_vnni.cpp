// Products of bytes by vpdpbusd on vectors of 512 bits.

#include "int4_bytes.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define UNROLL _Pragma("GCC unroll 16")
#define INLINE inline __attribute__((always_inline))

namespace qembed {
namespace {

// Adds the products of ROWS rows, each of DIGITS lines, with PANELS panels. `lines` is the first row's high digit; its low digit is
// LINES / 2 lines further.
template <int ROWS, int DIGITS, int PANELS>
AVX512 INLINE void tile(const Chunk &c, const uint8_t *lines, int row) {
    __m512i sums[ROWS][DIGITS][PANELS];
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int d = 0; d < DIGITS; d++)
            UNROLL for (int p = 0; p < PANELS; p++) sums[r][d][p] = _mm512_setzero_si512();
    const int8_t *weights = c.weights;
    size_t panel_bytes = (size_t)c.inputs * PANEL;
    for (int t = 0; t < c.tiles; t++, lines += (size_t)LINES * c.tile_inputs) {
        for (int k = 0; k < c.tile_inputs; k += 4, weights += 4 * PANEL) {
            __m512i w[PANELS];
            UNROLL for (int p = 0; p < PANELS; p++) w[p] = _mm512_load_si512(weights + p * panel_bytes);
            UNROLL for (int r = 0; r < ROWS; r++) {
                UNROLL for (int d = 0; d < DIGITS; d++) {
                    const uint8_t *line = lines + (size_t)(r + d * LINES / 2) * c.tile_inputs + k;
                    __m512i x = _mm512_set1_epi32(*(const int32_t *)line);
                    UNROLL for (int p = 0; p < PANELS; p++) sums[r][d][p] = _mm512_dpbusd_epi32(sums[r][d][p], x, w[p]);
                }
            }
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++) {
        __m512 step = _mm512_set1_ps(c.steps[row + r]);
        UNROLL for (int p = 0; p < PANELS; p++) {
            float *at = c.sums + (size_t)(row + r) * GANG * PANEL + p * PANEL;
            __m512i sum = sums[r][0][p];
            if (DIGITS == 2) sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), sums[r][DIGITS - 1][p]);
            sum = _mm512_add_epi32(sum, _mm512_load_si512(c.offsets + p * PANEL));
            __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), step);
            _mm512_store_ps(at, _mm512_fmadd_ps(product, _mm512_load_ps(c.scales + p * PANEL), _mm512_load_ps(at)));
        }
    }
}

template <int DIGITS, int PANELS>
AVX512 void multiply(const Chunk &c) {
    constexpr int BLOCK = LINES / DIGITS;             // rows
    constexpr int TILE = (PANELS > 2 ? 6 : 12) / DIGITS;  // rows: their sums fill 24 of the 32 registers
    for (int first = 0; first < c.rows; first += BLOCK) {
        const uint8_t *lines = c.lines + (size_t)(first / BLOCK) * LINES * c.inputs;
        int rows = c.rows - first < BLOCK ? c.rows - first : BLOCK, r = 0;
        for (; r + TILE <= rows; r += TILE) tile<TILE, DIGITS, PANELS>(c, lines + (size_t)r * c.tile_inputs, first + r);
        for (; r + 2 <= rows; r += 2) tile<2, DIGITS, PANELS>(c, lines + (size_t)r * c.tile_inputs, first + r);
        for (; r < rows; r++) tile<1, DIGITS, PANELS>(c, lines + (size_t)r * c.tile_inputs, first + r);
    }
}

template <int DIGITS>
void multiply_panels(const Chunk &c) {
    switch (c.panels) {
        case 1: return multiply<DIGITS, 1>(c);
        case 2: return multiply<DIGITS, 2>(c);
        case 3: return multiply<DIGITS, 3>(c);
        default: return multiply<DIGITS, 4>(c);
    }
}

}  // namespace

Multiply multiply_vnni(int digits) { return digits == 1 ? multiply_panels<1> : multiply_panels<2>; }

}  // namespace qembed

#endif
