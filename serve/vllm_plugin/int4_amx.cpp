// Products of bytes in the tiles of AMX: 32 lines by 32 outputs at once.

#include "int4_bytes.h"

#include <string.h>

#ifdef HAS_AMX

#define AMX __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512vl,avx512dq")))
#define INLINE inline __attribute__((always_inline))

namespace qembed {
namespace {

struct __attribute__((packed)) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// GCC's intrinsics of tiles do not tell the compiler that they read and write memory.
INLINE void memory_barrier() { __asm__ volatile("" ::: "memory"); }

// Tiles 0 to 3 hold sums, 4 and 5 lines, 6 and 7 weights of two panels.
template <bool SECOND_LINES, bool SECOND_PANEL>
AMX INLINE void products(const Chunk &c, const uint8_t *lines, const int8_t *weights, int32_t *out) {
    size_t panel_bytes = (size_t)c.inputs * PANEL;
    memory_barrier();
    _tile_zero(0);
    if (SECOND_PANEL) _tile_zero(1);
    if (SECOND_LINES) _tile_zero(2);
    if (SECOND_LINES && SECOND_PANEL) _tile_zero(3);
    for (int t = 0; t < c.tiles; t++) {
        _tile_loadd(6, weights, 4 * PANEL);
        _tile_loadd(4, lines, c.tile_inputs);
        _tile_dpbssd(0, 4, 6);
        if (SECOND_LINES) {
            _tile_loadd(5, lines + (size_t)LINES / 2 * c.tile_inputs, c.tile_inputs);
            _tile_dpbssd(2, 5, 6);
        }
        if (SECOND_PANEL) {
            _tile_loadd(7, weights + panel_bytes, 4 * PANEL);
            _tile_dpbssd(1, 4, 7);
        }
        if (SECOND_LINES && SECOND_PANEL) _tile_dpbssd(3, 5, 7);
        lines += (size_t)LINES * c.tile_inputs;
        weights += (size_t)c.tile_inputs * PANEL;
    }
    constexpr int STRIDE = 2 * PANEL * sizeof(int32_t);
    _tile_stored(0, out, STRIDE);
    if (SECOND_PANEL) _tile_stored(1, out + PANEL, STRIDE);
    if (SECOND_LINES) _tile_stored(2, out + LINES * PANEL, STRIDE);
    if (SECOND_LINES && SECOND_PANEL) _tile_stored(3, out + LINES * PANEL + PANEL, STRIDE);
    memory_barrier();
}

// Lines of up to LINES rows times digits by one or two panels.
struct Unit {
    const uint8_t *lines;
    const int8_t *weights;
    int row, rows, panel, panels;
};

template <int DIGITS>
AMX INLINE void multiply_unit(const Chunk &c, const Unit &u, int32_t *out) {
    if (DIGITS == 2 || u.rows > LINES / 2) {
        if (u.panels == 2) products<true, true>(c, u.lines, u.weights, out);
        else products<true, false>(c, u.lines, u.weights, out);
    } else {
        if (u.panels == 2) products<false, true>(c, u.lines, u.weights, out);
        else products<false, false>(c, u.lines, u.weights, out);
    }
}

template <int DIGITS, int PANELS>
AMX INLINE void add(const Chunk &c, const Unit &u, const int32_t *out) {
    __m512 scales[PANELS];
    for (int p = 0; p < PANELS; p++) scales[p] = _mm512_load_ps(c.scales + (u.panel + p) * PANEL);
    for (int r = 0; r < u.rows; r++) {
        __m512 step = _mm512_set1_ps(c.steps[u.row + r]);
        float *at = c.sums + (size_t)(u.row + r) * GANG * PANEL + u.panel * PANEL;
        for (int p = 0; p < PANELS; p++, at += PANEL) {
            __m512i sum = _mm512_load_si512(out + (r * 2 + p) * PANEL);
            if (DIGITS == 2) {
                __m512i low = _mm512_load_si512(out + ((r + LINES / 2) * 2 + p) * PANEL);
                sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), low);
            }
            __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), step);
            _mm512_store_ps(at, _mm512_fmadd_ps(product, scales[p], _mm512_load_ps(at)));
        }
    }
}

// Tiles take some 200 cycles from the first load to the last store. The next unit's products therefore start before those of the
// last one are added to the sums.
template <int DIGITS>
AMX void multiply(const Chunk &c) {
    constexpr int BLOCK = LINES / DIGITS;  // rows
    alignas(64) int32_t out[2][LINES * 2 * PANEL];
    Unit last = {};
    int turn = 0;
    for (int panel = 0; panel < c.panels; panel += 2) {
        const int8_t *weights = c.weights + (size_t)panel * c.inputs * PANEL;
        for (int row = 0; row < c.rows; row += BLOCK) {
            Unit next = {c.lines + (size_t)(row / BLOCK) * LINES * c.inputs, weights, row,
                         c.rows - row < BLOCK ? c.rows - row : BLOCK, panel, panel + 1 < c.panels ? 2 : 1};
            multiply_unit<DIGITS>(c, next, out[turn]);
            turn ^= 1;
            if (last.panels == 2) add<DIGITS, 2>(c, last, out[turn]);
            else if (last.panels == 1) add<DIGITS, 1>(c, last, out[turn]);
            last = next;
        }
    }
    if (last.panels == 2) add<DIGITS, 2>(c, last, out[turn ^ 1]);
    else add<DIGITS, 1>(c, last, out[turn ^ 1]);
}

}  // namespace

Multiply multiply_amx(int digits) { return digits == 1 ? multiply<1> : multiply<2>; }

AMX void begin_amx(int tile_inputs) {
    alignas(64) Config config;
    memset(&config, 0, sizeof(config));
    config.palette = 1;
    for (int tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = tile == 4 || tile == 5 ? tile_inputs : 4 * PANEL;
        config.rows[tile] = tile < 6 ? 16 : tile_inputs / 4;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

AMX void end_amx() { _tile_release(); }

}  // namespace qembed

#endif
