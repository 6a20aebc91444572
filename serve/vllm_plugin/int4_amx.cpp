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

// Lines of up to LINES rows times digits by one or two panels.
struct Unit {
    const uint8_t *lines;
    const int8_t *weights;
    int row, rows, panel, panels;
};

// Tiles 0 to 3 hold sums, 4 and 5 lines, 6 and 7 weights of two panels.
template <bool SECOND_LINES, bool SECOND_PANEL>
AMX INLINE void multiply_tiles(const Chunk &c, const Unit &u) {
    const uint8_t *lines = u.lines;
    const int8_t *weights = u.weights;
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
            _tile_loadd(7, weights + (size_t)c.inputs * PANEL, 4 * PANEL);
            _tile_dpbssd(1, 4, 7);
        }
        if (SECOND_LINES && SECOND_PANEL) _tile_dpbssd(3, 5, 7);
        lines += (size_t)LINES * c.tile_inputs;
        weights += (size_t)c.tile_inputs * PANEL;
    }
}

template <bool SECOND_LINES, bool SECOND_PANEL>
AMX INLINE void store_tiles(int32_t *out) {
    constexpr int STRIDE = 2 * PANEL * sizeof(int32_t);
    _tile_stored(0, out, STRIDE);
    if (SECOND_PANEL) _tile_stored(1, out + PANEL, STRIDE);
    if (SECOND_LINES) _tile_stored(2, out + LINES * PANEL, STRIDE);
    if (SECOND_LINES && SECOND_PANEL) _tile_stored(3, out + LINES * PANEL + PANEL, STRIDE);
    memory_barrier();
}

// Adds the sums in `out`, of one unit's tiles.
template <int DIGITS, int PANELS>
AMX INLINE void add(const Chunk &c, const Unit &u, const int32_t *out) {
    __m512 scales[PANELS];
    for (int p = 0; p < PANELS; p++) scales[p] = _mm512_load_ps(c.scales + (u.panel + p) * PANEL);
    const float *steps = c.steps + u.row;
    float *at = c.sums + (size_t)u.row * GANG * PANEL + u.panel * PANEL;
    for (int r = 0, rows = u.rows; r < rows; r++, at += GANG * PANEL) {
        __m512 step = _mm512_set1_ps(steps[r]);
        for (int p = 0; p < PANELS; p++) {
            __m512i sum = _mm512_load_si512(out + (r * 2 + p) * PANEL);
            if (DIGITS == 2) {
                __m512i low = _mm512_load_si512(out + ((r + LINES / 2) * 2 + p) * PANEL);
                sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), low);
            }
            __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), step);
            _mm512_store_ps(at + p * PANEL, _mm512_fmadd_ps(product, scales[p], _mm512_load_ps(at + p * PANEL)));
        }
    }
}

template <int DIGITS>
AMX INLINE void add(const Chunk &c, const Unit &u, const int32_t *out) {
    if (u.panels == 2) add<DIGITS, 2>(c, u, out);
    else if (u.panels == 1) add<DIGITS, 1>(c, u, out);
}

template <int DIGITS, bool SECOND_LINES, bool SECOND_PANEL>
AMX INLINE void step(const Chunk &c, const Unit &last, const Unit &next, int32_t *out) {
    multiply_tiles<SECOND_LINES, SECOND_PANEL>(c, next);
    add<DIGITS>(c, last, out);
    store_tiles<SECOND_LINES, SECOND_PANEL>(out);
}

// A unit's tiles are multiplied while the last unit's sums are added, and stored after that: a load behind a store of tiles that
// has the same 12 low bits of its address would wait for all products before it.
template <int DIGITS>
AMX void multiply(const Chunk &c) {
    constexpr int BLOCK = LINES / DIGITS;  // rows
    alignas(64) int32_t out[LINES * 2 * PANEL];
    Unit last = {};
    for (int panel = 0; panel < c.panels; panel += 2) {
        const int8_t *weights = c.weights + (size_t)panel * c.inputs * PANEL;
        for (int row = 0; row < c.rows; row += BLOCK) {
            int rows = c.rows - row < BLOCK ? c.rows - row : BLOCK, panels = panel + 1 < c.panels ? 2 : 1;
            Unit next = {c.lines + (size_t)(row / BLOCK) * LINES * c.inputs, weights, row, rows, panel, panels};
            if (DIGITS == 2 || rows > LINES / 2) {
                if (panels == 2) step<DIGITS, true, true>(c, last, next, out);
                else step<DIGITS, true, false>(c, last, next, out);
            } else {
                if (panels == 2) step<DIGITS, false, true>(c, last, next, out);
                else step<DIGITS, false, false>(c, last, next, out);
            }
            last = next;
        }
    }
    add<DIGITS>(c, last, out);
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
