// The INT4 linear layer for CPUs with AVX2, behind a plain C interface that int4_native.py loads with ctypes.
//
// Activations are quantized to 16-bit integers, with a step for each row and chunk of inputs. Products are then exact integer
// sums (vpmaddwd: 16 products per instruction, twice as many as a float32 FMA), scaled once per chunk:
//
//   y[m, n] = sum over chunks of  step[m, c] * (scale[n, g] * sum(q * x16) - scale[n, g] * zero[n, g] * sum(x16))
//
// A step is 1/32767 of the chunk's largest magnitude. The error is about 3e-5 of a row, against 8e-3 in bfloat16. Each output
// is summed in the same order whatever the number of rows, so a row's result does not depend on the other rows, bit for bit.
//
// Weights are stored in panels of 16 outputs. 4 inputs of a panel are 32 bytes: 16-bit word 2 o + j holds, from its low end, the
// nibbles (output o, input j), (o + 8, j), (o, j + 2), (o + 8, j + 2), so vpmaddwd's operands need only shifts and masks.

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <cpuid.h>
#include <immintrin.h>
#include <sched.h>

#if defined(__clang__) || __GNUC__ >= 11
#define HAS_VNNI
#endif
#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define UNROLL _Pragma("GCC unroll 8")
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int PANEL = 16;        // outputs
constexpr int TILE = 6;          // rows per tile: 12 sums, 2 weights and 2 products fill the 16 registers
constexpr int FUSED = 4;         // up to so many rows weights are unpacked in registers, beyond once for all rows
constexpr int MAX_CHUNK = 128;   // inputs
constexpr int BLOCK_ROWS = 96;   // rows that share one unpacking of a panel's chunk
constexpr int SLAB_ROWS = 768;   // rows whose 16-bit inputs are in memory at once
constexpr float LEVELS = 32767.0f;
constexpr float TINY = 1e-34f;   // below it 32767 / x is not finite

enum Dtype { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

// Shared by all threads that compute one slab of rows.
struct Slab {
    const char *x;
    char *out;
    int dtype, vnni;
    int rows, inputs, outputs, group, chunk, block_rows;
    const uint8_t *values;
    const void *scales;
    int scales_dtype;
    const uint8_t *zeros;
    const float *bias;
    int16_t *x16;        // [blocks][chunks][block_rows][chunk]
    float *steps;        // [blocks][chunks][block_rows]
    float *sums;         // the same shape: step * sum(x16)
    int panels_per_task, row_tasks, tasks;
    int next_row, rows_done, next_task;
};

int ceil_div(int a, int b) { return (a + b - 1) / b; }

AVX2 INLINE __m256 load8(const char *x, int dtype, size_t i) {
    if (dtype == FLOAT32) return _mm256_loadu_ps((const float *)x + i);
    __m128i half = _mm_loadu_si128((const __m128i *)((const uint16_t *)x + i));
    if (dtype == FLOAT16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

AVX2 float load1(const char *x, int dtype, size_t i) {
    if (dtype == FLOAT32) return ((const float *)x)[i];
    uint16_t half = ((const uint16_t *)x)[i];
    if (dtype == FLOAT16) return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((int)((uint32_t)half << 16))));
}

AVX2 void store1(char *out, int dtype, size_t i, float value) {
    if (dtype == FLOAT32) {
        ((float *)out)[i] = value;
    } else if (dtype == FLOAT16) {
        __m128i half = _mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT);
        ((uint16_t *)out)[i] = (uint16_t)_mm_cvtsi128_si32(half);
    } else {
        uint32_t bits = (uint32_t)_mm_cvtsi128_si32(_mm_castps_si128(_mm_set_ss(value)));
        bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
        ((uint16_t *)out)[i] = nan ? 0x7fc0 : (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
    }
}

AVX2 INLINE void store8(char *out, int dtype, size_t i, __m256 v) {
    if (dtype == FLOAT32) return _mm256_storeu_ps((float *)out + i, v);
    __m128i halves;
    if (dtype == FLOAT16) {
        halves = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    } else {
        __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
        __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
        halves = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    }
    _mm_storeu_si128((__m128i *)((uint16_t *)out + i), halves);
}

AVX2 INLINE float horizontal_max(__m256 v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

// Quantizes one row's chunk to 16 bits. A non-finite value makes the step NaN, and so the row's outputs.
AVX2 void quantize_chunk(const char *x, int dtype, size_t first, int chunk, int16_t *x16, float *step, float *sum) {
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 largest = _mm256_setzero_ps(), nans = _mm256_setzero_ps();
    int i = 0;
    for (; i + 8 <= chunk; i += 8) {
        __m256 v = load8(x, dtype, first + i);
        largest = _mm256_max_ps(_mm256_and_ps(v, magnitude), largest);
        nans = _mm256_add_ps(nans, _mm256_sub_ps(v, v));  // 0, or NaN if v is not finite
    }
    float maximum = horizontal_max(largest), nan = 0;
    for (int j = i; j < chunk; j++) {
        float v = load1(x, dtype, first + j), size = __builtin_fabsf(v);
        if (size > maximum) maximum = size;
        nan += v - v;
    }
    if (_mm256_movemask_ps(_mm256_cmp_ps(nans, nans, _CMP_UNORD_Q)) || nan != nan) {
        for (int j = 0; j < chunk; j++) x16[j] = 0;
        *step = *sum = __builtin_nanf("");
        return;
    }
    float inverse = maximum < TINY ? 0.0f : LEVELS / maximum;
    const __m256 factor = _mm256_set1_ps(inverse);
    __m256i total = _mm256_setzero_si256();
    int rest = 0;
    i = 0;
    for (; i + 8 <= chunk; i += 8) {
        __m256i v = _mm256_cvtps_epi32(_mm256_mul_ps(load8(x, dtype, first + i), factor));
        total = _mm256_add_epi32(total, v);
        __m128i narrow = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        _mm_storeu_si128((__m128i *)(x16 + i), narrow);
    }
    for (; i < chunk; i++) {
        int v = _mm_cvtss_si32(_mm_set_ss(load1(x, dtype, first + i) * inverse));
        x16[i] = (int16_t)(v > 32767 ? 32767 : v < -32767 ? -32767 : v);
        rest += x16[i];
    }
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1));
    *step = maximum < TINY ? 0.0f : maximum / LEVELS;
    *sum = *step * (float)(_mm_cvtsi128_si32(t) + rest);
}

// Loads the scales, and scale * zero, of a panel's 16 outputs in one group.
AVX2 INLINE void group_constants(const Slab *s, size_t index, float *scale, float *scaled_zero) {
    for (int half = 0; half < 2; half++) {
        size_t offset = index * PANEL + 8 * half;
        __m256 v = load8((const char *)s->scales, s->scales_dtype, offset);
        __m256i z = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(s->zeros + offset)));
        _mm256_store_ps(scale + 8 * half, v);
        _mm256_store_ps(scaled_zero + 8 * half, _mm256_mul_ps(v, _mm256_cvtepi32_ps(z)));
    }
}

AVX2 INLINE void split(const uint8_t *packed, __m256i *v) {
    const __m256i mask = _mm256_set1_epi16(15);
    __m256i p = _mm256_loadu_si256((const __m256i *)packed);
    v[0] = _mm256_and_si256(p, mask);
    v[1] = _mm256_and_si256(_mm256_srli_epi16(p, 4), mask);
    v[2] = _mm256_and_si256(_mm256_srli_epi16(p, 8), mask);
    v[3] = _mm256_srli_epi16(p, 12);
}

AVX2 void unpack(const uint8_t *packed, int chunk, int16_t *out) {
    for (int k = 0; k < chunk; k += 4) {
        __m256i v[4];
        split(packed + 8 * k, v);
        for (int i = 0; i < 4; i++) _mm256_store_si256((__m256i *)(out + 16 * k) + i, v[i]);
    }
}

// Adds the products of two inputs with a panel's two halves. In assembly, because compilers interleave the rows of a tile and
// run out of registers.
template <bool VNNI>
AVX2 INLINE void multiply_add(const int16_t *x, __m256i first, __m256i second, __m256i &sums, __m256i &other_sums) {
    __m256i product, other;
#ifdef HAS_VNNI
    if (VNNI) {
        __asm__ volatile(
            "vpbroadcastd %[x], %[product]\n\t"
            "%{vex%} vpdpwssd %[first], %[product], %[sums]\n\t"
            "%{vex%} vpdpwssd %[second], %[product], %[other_sums]"
            : [sums] "+x"(sums), [other_sums] "+x"(other_sums), [product] "=&x"(product)
            : [x] "m"(*(const int *)x), [first] "x"(first), [second] "x"(second));
        return;
    }
#endif
    __asm__ volatile(
        "vpbroadcastd %[x], %[product]\n\t"
        "vpmaddwd %[second], %[product], %[other]\n\t"
        "vpmaddwd %[first], %[product], %[product]\n\t"
        "vpaddd %[product], %[sums], %[sums]\n\t"
        "vpaddd %[other], %[other_sums], %[other_sums]"
        : [sums] "+x"(sums), [other_sums] "+x"(other_sums), [product] "=&x"(product), [other] "=&x"(other)
        : [x] "m"(*(const int *)x), [first] "x"(first), [second] "x"(second));
}

// Adds the products of ROWS rows with one chunk of a panel to c [ROWS, 16]. UNPACK: `weights` are packed, otherwise unpacked.
template <int ROWS, bool UNPACK, bool VNNI>
AVX2 void tile(const int16_t *x16, int chunk, const void *weights, const float *steps, const float *sums, const float *scale,
               const float *scaled_zero, float *c) {
    __m256i acc[ROWS][2];
    UNROLL for (int r = 0; r < ROWS; r++) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
    if (UNPACK) {
        for (int k = 0; k < chunk; k += 4) {
            __m256i w[4];
            split((const uint8_t *)weights + 8 * k, w);
            UNROLL for (int r = 0; r < ROWS; r++) {
                const int16_t *row = x16 + (size_t)r * chunk + k;
                multiply_add<VNNI>(row, w[0], w[1], acc[r][0], acc[r][1]);
                multiply_add<VNNI>(row + 2, w[2], w[3], acc[r][0], acc[r][1]);
            }
        }
    } else {
        const __m256i *w = (const __m256i *)weights;
        for (int k = 0; k < chunk; k += 2) {
            __m256i first = _mm256_load_si256(w + k), second = _mm256_load_si256(w + k + 1);
            UNROLL for (int r = 0; r < ROWS; r++) {
                multiply_add<VNNI>(x16 + (size_t)r * chunk + k, first, second, acc[r][0], acc[r][1]);
            }
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++) {
        __m256 step = _mm256_set1_ps(steps[r]), sum = _mm256_set1_ps(sums[r]);
        for (int half = 0; half < 2; half++) {
            float *at = c + PANEL * r + 8 * half;
            __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(acc[r][half]), step);
            __m256 value = _mm256_fmadd_ps(product, _mm256_load_ps(scale + 8 * half), _mm256_load_ps(at));
            _mm256_store_ps(at, _mm256_fnmadd_ps(sum, _mm256_load_ps(scaled_zero + 8 * half), value));
        }
    }
}

template <bool UNPACK, bool VNNI>
void tile_of(int rows, const int16_t *x16, int chunk, const void *weights, const float *steps, const float *sums,
             const float *scale, const float *scaled_zero, float *c) {
    switch (rows) {
        case 1: return tile<1, UNPACK, VNNI>(x16, chunk, weights, steps, sums, scale, scaled_zero, c);
        case 2: return tile<2, UNPACK, VNNI>(x16, chunk, weights, steps, sums, scale, scaled_zero, c);
        case 3: return tile<3, UNPACK, VNNI>(x16, chunk, weights, steps, sums, scale, scaled_zero, c);
        case 4: return tile<4, UNPACK, VNNI>(x16, chunk, weights, steps, sums, scale, scaled_zero, c);
        case 5: return tile<5, UNPACK, VNNI>(x16, chunk, weights, steps, sums, scale, scaled_zero, c);
        default: return tile<6, UNPACK, VNNI>(x16, chunk, weights, steps, sums, scale, scaled_zero, c);
    }
}

void quantize_row(const Slab *s, int row) {
    int chunks = s->inputs / s->chunk, block = row / s->block_rows, inside = row % s->block_rows;
    for (int c = 0; c < chunks; c++) {
        size_t at = ((size_t)block * chunks + c) * s->block_rows + inside;
        quantize_chunk(s->x, s->dtype, (size_t)row * s->inputs + (size_t)c * s->chunk, s->chunk, s->x16 + at * s->chunk,
                       s->steps + at, s->sums + at);
    }
}

// Multiplies one block of rows by one panel.
template <bool VNNI>
AVX2 void multiply(const Slab *s, int block, int panel) {
    alignas(32) float c[BLOCK_ROWS * PANEL];
    alignas(32) float scale[PANEL], scaled_zero[PANEL];
    alignas(32) int16_t unpacked[MAX_CHUNK * PANEL];
    int chunks = s->inputs / s->chunk, groups = s->inputs / s->group, chunks_per_group = s->group / s->chunk;
    int first = block * s->block_rows, rows = s->rows - first < s->block_rows ? s->rows - first : s->block_rows;
    int tiles = ceil_div(rows, TILE);
    for (int i = 0; i < rows * PANEL; i += 8) _mm256_store_ps(c + i, _mm256_setzero_ps());
    for (int k = 0; k < chunks; k++) {
        const uint8_t *packed = s->values + ((size_t)panel * s->inputs + (size_t)k * s->chunk) * (PANEL / 2);
        if (k % chunks_per_group == 0) group_constants(s, (size_t)panel * groups + k / chunks_per_group, scale, scaled_zero);
        size_t at = ((size_t)block * chunks + k) * s->block_rows;
        if (rows <= FUSED) {
            tile_of<true, VNNI>(rows, s->x16 + at * s->chunk, s->chunk, packed, s->steps + at, s->sums + at, scale, scaled_zero, c);
            continue;
        }
        unpack(packed, s->chunk, unpacked);
        for (int t = 0; t < tiles; t++) {
            int from = t * rows / tiles, count = (t + 1) * rows / tiles - from;
            tile_of<false, VNNI>(count, s->x16 + (at + from) * s->chunk, s->chunk, unpacked, s->steps + at + from,
                           s->sums + at + from, scale, scaled_zero, c + from * PANEL);
        }
    }
    int column = panel * PANEL, columns = s->outputs - column < PANEL ? s->outputs - column : PANEL;
    alignas(32) float bias[PANEL] = {0};
    for (int n = 0; s->bias && n < columns; n++) bias[n] = s->bias[column + n];
    for (int r = 0; r < rows; r++) {
        size_t at = (size_t)(first + r) * s->outputs + column;
        alignas(32) float last[PANEL];
        for (int half = 0; half < PANEL; half += 8) {
            __m256 v = _mm256_add_ps(_mm256_load_ps(c + r * PANEL + half), _mm256_load_ps(bias + half));
            if (columns == PANEL) store8(s->out, s->dtype, at + half, v);
            else _mm256_store_ps(last + half, v);
        }
        if (columns < PANEL) {
            for (int n = 0; n < columns; n++) store1(s->out, s->dtype, at + n, last[n]);
        }
    }
}

// One thread: quantizes rows until none are left, waits for the other threads' rows, then multiplies panels.
void work(void *argument) {
    Slab *s = (Slab *)argument;
    int panels = ceil_div(s->outputs, PANEL), parts = ceil_div(panels, s->panels_per_task);
    for (;;) {
        int task = __atomic_fetch_add(&s->next_row, 1, __ATOMIC_RELAXED);
        if (task >= s->row_tasks) break;
        int from = (int)((int64_t)task * s->rows / s->row_tasks), to = (int)((int64_t)(task + 1) * s->rows / s->row_tasks);
        for (int row = from; row < to; row++) quantize_row(s, row);
        __atomic_fetch_add(&s->rows_done, 1, __ATOMIC_RELEASE);
    }
    for (int spins = 0; __atomic_load_n(&s->rows_done, __ATOMIC_ACQUIRE) < s->row_tasks; spins++) {
        if (spins < 2000) _mm_pause();
        else sched_yield();
    }
    for (;;) {
        int task = __atomic_fetch_add(&s->next_task, 1, __ATOMIC_RELAXED);
        if (task >= s->tasks) break;
        int block = task / parts, from = task % parts * s->panels_per_task;
        int to = from + s->panels_per_task < panels ? from + s->panels_per_task : panels;
        for (int panel = from; panel < to; panel++) {
            if (s->vnni) multiply<true>(s, block, panel);
            else multiply<false>(s, block, panel);
        }
    }
}

}  // namespace

// 0: this CPU cannot run the kernel; 1: it has AVX2; 2: also AVX-VNNI, whose vpdpwssd fuses vpmaddwd and vpaddd.
extern "C" int qembed_int4_supported(void) {
    __builtin_cpu_init();
    // Every CPU with AVX2 has F16C.
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
#ifdef HAS_VNNI
    unsigned eax = 0, ebx, ecx, edx;
    if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 4))) return 2;
#endif
    return 1;
}

// out [rows, outputs] = x [rows, inputs] * weight + bias, both of `dtype`. Returns 1 if the 16-bit inputs cannot be allocated,
// else 0. `values` [panels, inputs / 4, 32] bytes in the layout above, `scales` [panels, inputs / group, 16] of `scales_dtype`,
// `zeros` the same shape in bytes, `bias` [outputs] float32 or null. `chunk` divides `group`, is a multiple of 4 and at most
// 128. `parallel` is the GOMP_parallel of torch's OpenMP, or null for one thread. `vnni`: use AVX-VNNI; the result is the same.
extern "C" int qembed_int4_linear(const void *x, void *out, int dtype, int64_t rows, int inputs, int outputs, int group, int chunk,
                                  const uint8_t *values, const void *scales, int scales_dtype, const uint8_t *zeros,
                                  const float *bias, void *parallel, int threads, int vnni) {
    if (rows <= 0) return 0;
    int chunks = inputs / chunk, padded = (rows < SLAB_ROWS ? (int)rows : SLAB_ROWS) + BLOCK_ROWS;
    size_t bytes = (size_t)padded * inputs * sizeof(int16_t), constants = (size_t)padded * chunks * sizeof(float);
    char *scratch = (char *)malloc(bytes + 2 * constants);
    if (!scratch) return 1;
    size_t width = dtype == FLOAT32 ? 4 : 2;
    for (int64_t first = 0; first < rows; first += SLAB_ROWS) {
        Slab s = {};
        s.rows = rows - first < SLAB_ROWS ? (int)(rows - first) : SLAB_ROWS;
        s.x = (const char *)x + width * first * inputs;
        s.out = (char *)out + width * first * outputs;
        s.dtype = dtype, s.vnni = vnni, s.inputs = inputs, s.outputs = outputs, s.group = group, s.chunk = chunk;
        s.values = values, s.scales = scales, s.scales_dtype = scales_dtype, s.zeros = zeros, s.bias = bias;
        s.x16 = (int16_t *)scratch;
        s.steps = (float *)(scratch + bytes);
        s.sums = (float *)(scratch + bytes + constants);
        int blocks = ceil_div(s.rows, BLOCK_ROWS), panels = ceil_div(outputs, PANEL);
        s.block_rows = ceil_div(s.rows, blocks);
        int parts = ceil_div(threads * 8, blocks);
        s.panels_per_task = panels > parts ? panels / parts : 1;
        s.tasks = blocks * ceil_div(panels, s.panels_per_task);
        s.row_tasks = s.rows < 4 * threads ? s.rows : 4 * threads;
        if (parallel && threads > 1) ((Parallel)parallel)(work, &s, (unsigned)threads, 0);
        else work(&s);
    }
    free(scratch);
    return 0;
}

#else

extern "C" int qembed_int4_supported(void) { return 0; }

extern "C" int qembed_int4_linear(const void *, void *, int, int64_t, int, int, int, int, const uint8_t *, const void *, int,
                                  const uint8_t *, const float *, void *, int, int) {
    return 1;
}

#endif
