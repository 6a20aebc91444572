// The INT4 linear layer for CPUs with AVX-512 VNNI or AMX, behind a plain C interface that int4_native.py loads with ctypes.
//
// Activations are quantized to integers, with a step for each row and chunk of inputs. Products are then exact integer sums, scaled
// once per chunk:
//
//   y[m, n] = sum over chunks of  step[m, c] * scale[n, g] * sum((q - zero) * integer)
//
// With two digits an integer has 16 bits, a step is 1/32639 of the chunk's largest magnitude, and the error is about 3e-5 of a row;
// with one digit it has 8 bits, and half the products are needed. Each output is summed in the same order whatever the number of
// rows and the instruction set, so a row's result depends on neither, bit for bit.

#include "int4_bytes.h"

#include <stdlib.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <cpuid.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define INLINE inline __attribute__((always_inline))

namespace qembed {
namespace {

constexpr int SLAB_ROWS = 1024;  // rows whose integers are in memory at once
constexpr float TINY = 1e-34f;   // below it a level / x is not finite
constexpr int SHIFTED = 0x80;    // what vpdpbusd's unsigned bytes have in addition

enum Dtype { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };
enum Instructions { VNNI = 1, AMX = 2 };

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

// Shared by all threads that compute one slab of rows.
struct Slab {
    const char *x;
    char *out;
    int dtype, instructions, digits;
    int rows, inputs, outputs, group, chunk, tiles, tile_inputs, block_rows;
    const uint8_t *values;
    const void *scales;
    int scales_dtype;
    const uint8_t *zeros;
    const float *bias;
    uint8_t *lines;  // [blocks][chunks][block_rows * digits][chunk], in the order of Chunk
    float *steps;    // [blocks][chunks][block_rows]
    int gangs_per_task, row_tasks, tasks;
    int next_row, rows_done, next_task;
};

int ceil_div(int a, int b) { return (a + b - 1) / b; }

AVX512 INLINE __m512 load16(const char *x, int dtype, size_t i, __mmask16 mask) {
    if (dtype == FLOAT32) return _mm512_maskz_loadu_ps(mask, (const float *)x + i);
    __m256i half = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)x + i);
    if (dtype == FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

AVX512 INLINE void store16(char *out, int dtype, size_t i, __mmask16 mask, __m512 v) {
    if (dtype == FLOAT32) return _mm512_mask_storeu_ps((float *)out + i, mask, v);
    __m256i halves;
    if (dtype == FLOAT16) {
        halves = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    } else {
        __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
        rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0));
        halves = _mm512_cvtepi32_epi16(rounded);
    }
    _mm256_mask_storeu_epi16((uint16_t *)out + i, mask, halves);
}

INLINE __mmask16 first(int count) { return (__mmask16)(count >= 16 ? 0xffff : (1 << count) - 1); }

// Quantizes one row's chunk. A non-finite value makes the step NaN, and so the row's outputs.
AVX512 void quantize_chunk(const Slab *s, size_t at, uint8_t *line, float *step) {
    __m512 largest = _mm512_setzero_ps(), nans = _mm512_setzero_ps();
    for (int i = 0; i < s->chunk; i += 16) {
        __m512 v = load16(s->x, s->dtype, at + i, first(s->chunk - i));
        largest = _mm512_max_ps(_mm512_abs_ps(v), largest);
        nans = _mm512_add_ps(nans, _mm512_sub_ps(v, v));  // 0, or NaN if v is not finite
    }
    float maximum = _mm512_reduce_max_ps(largest), levels = s->digits == 1 ? 127.0f : 32639.0f;
    bool finite = _mm512_cmp_ps_mask(nans, nans, _CMP_UNORD_Q) == 0;
    const __m512 factor = _mm512_set1_ps(!finite || maximum < TINY ? 0.0f : levels / maximum);
    const __m512i half = _mm512_set1_epi32(128), shifted = _mm512_set1_epi32(s->instructions == VNNI ? SHIFTED : 0);
    for (int t = 0; t < s->tiles; t++, line += (size_t)LINES * s->tile_inputs) {
        for (int i = 0; i < s->tile_inputs; i += 16) {
            __mmask16 mask = first(s->tile_inputs - i);
            __m512 x = load16(s->x, s->dtype, at + (size_t)t * s->tile_inputs + i, mask);
            __m512i v = finite ? _mm512_cvtps_epi32(_mm512_mul_ps(x, factor)) : _mm512_setzero_si512();
            if (s->digits == 2) {
                __m512i high = _mm512_srai_epi32(_mm512_add_epi32(v, half), 8);
                __m512i low = _mm512_sub_epi32(v, _mm512_slli_epi32(high, 8));
                uint8_t *second = line + (size_t)LINES / 2 * s->tile_inputs;
                _mm_mask_storeu_epi8(second + i, mask, _mm512_cvtepi32_epi8(_mm512_xor_si512(low, shifted)));
                v = high;
            }
            _mm_mask_storeu_epi8(line + i, mask, _mm512_cvtepi32_epi8(_mm512_xor_si512(v, shifted)));
        }
    }
    *step = !finite ? __builtin_nanf("") : maximum < TINY ? 0.0f : maximum / levels;
}

void quantize_row(const Slab *s, int row) {
    int chunks = s->inputs / s->chunk, block = row / s->block_rows, inside = row % s->block_rows, rows = LINES / s->digits;
    for (int c = 0; c < chunks; c++) {
        size_t at = ((size_t)block * chunks + c) * s->block_rows;
        size_t line = (at + inside / rows * rows) * s->digits * s->chunk + (size_t)(inside % rows) * s->tile_inputs;
        quantize_chunk(s, (size_t)row * s->inputs + (size_t)c * s->chunk, s->lines + line, s->steps + at + inside);
    }
}

// Unpacks one panel's chunk to signed bytes less the zero points. `offset` is the factor times each output's sum of them.
AVX512 void unpack(const uint8_t *packed, int chunk, const uint8_t *zeros, int factor, int8_t *out, int32_t *offset) {
    const __m512i mask = _mm512_set1_epi8(15), once = _mm512_set1_epi8(1);
    __m512i zero = _mm512_mullo_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)zeros)), _mm512_set1_epi32(0x01010101));
    __m512i total = _mm512_setzero_si512();
    for (int k = 0; k < chunk; k += 8, packed += 64, out += 128) {
        __m512i pair = _mm512_loadu_si512(packed);
        __m512i low = _mm512_sub_epi8(_mm512_and_si512(pair, mask), zero);
        __m512i high = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(pair, 4), mask), zero);
        _mm512_store_si512(out, low);
        _mm512_store_si512(out + 64, high);
        total = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(total, once, low), once, high);
    }
    _mm512_store_si512(offset, _mm512_mullo_epi32(total, _mm512_set1_epi32(factor)));
}

// Multiplies one block of rows by up to GANG panels.
AVX512 void multiply(const Slab *s, int block, int gang, Multiply products) {
    alignas(64) float sums[MAX_ROWS * GANG * PANEL];
    alignas(64) float scales[GANG * PANEL];
    alignas(64) int32_t offsets[GANG * PANEL];
    alignas(64) int8_t weights[GANG * MAX_CHUNK * PANEL];
    int chunks = s->inputs / s->chunk, groups = s->inputs / s->group, chunks_per_group = s->group / s->chunk;
    int all = ceil_div(s->outputs, PANEL), from = gang * GANG, panels = all - from < GANG ? all - from : GANG;
    int start = block * s->block_rows, rows = s->rows - start < s->block_rows ? s->rows - start : s->block_rows;
    int factor = s->instructions == AMX ? 0 : s->digits == 1 ? -SHIFTED : -SHIFTED * 257;
    for (int i = 0; i < rows * GANG * PANEL; i += 16) _mm512_store_ps(sums + i, _mm512_setzero_ps());
    for (int k = 0; k < chunks; k++) {
        for (int p = 0; p < panels; p++) {
            size_t group = ((size_t)(from + p) * groups + k / chunks_per_group) * PANEL;
            size_t packed = ((size_t)(from + p) * s->inputs + (size_t)k * s->chunk) * (PANEL / 2);
            _mm512_store_ps(scales + p * PANEL, load16((const char *)s->scales, s->scales_dtype, group, 0xffff));
            unpack(s->values + packed, s->chunk, s->zeros + group, factor, weights + (size_t)p * s->chunk * PANEL, offsets + p * PANEL);
        }
        size_t at = ((size_t)block * chunks + k) * s->block_rows;
        products({s->lines + at * s->digits * s->chunk, s->steps + at, weights, offsets, scales, sums, rows, panels, s->chunk,
                  s->tiles, s->tile_inputs});
    }
    int column = from * PANEL;
    for (int r = 0; r < rows; r++) {
        for (int p = 0; p < panels; p++) {
            int at = column + p * PANEL;
            __mmask16 mask = first(s->outputs - at);
            __m512 sum = _mm512_load_ps(sums + (r * GANG + p) * PANEL);
            if (s->bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, s->bias + at));
            store16(s->out, s->dtype, (size_t)(start + r) * s->outputs + at, mask, sum);
        }
    }
}

// One thread: quantizes rows until none are left, waits for the other threads' rows, then multiplies panels.
void work(void *argument) {
    Slab *s = (Slab *)argument;
    int gangs = ceil_div(ceil_div(s->outputs, PANEL), GANG), parts = ceil_div(gangs, s->gangs_per_task);
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
    Multiply products = multiply_vnni(s->digits);
#ifdef HAS_AMX
    if (s->instructions == AMX) products = multiply_amx(s->digits), begin_amx(s->tile_inputs);
#endif
    for (;;) {
        int task = __atomic_fetch_add(&s->next_task, 1, __ATOMIC_RELAXED);
        if (task >= s->tasks) break;
        int block = task / parts, from = task % parts * s->gangs_per_task;
        int to = from + s->gangs_per_task < gangs ? from + s->gangs_per_task : gangs;
        for (int gang = from; gang < to; gang++) multiply(s, block, gang, products);
    }
#ifdef HAS_AMX
    if (s->instructions == AMX) end_amx();
#endif
}

// Whether the CPU has AMX and Linux lets this process use it.
bool has_amx() {
#ifdef HAS_AMX
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    constexpr unsigned TILE = 1u << 24, INT8 = 1u << 25;
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & TILE) || !(edx & INT8)) return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

}  // namespace
}  // namespace qembed

// The instruction sets that this CPU has and this process may use: bit 0 AVX-512 VNNI, bit 1 AMX.
extern "C" int qembed_int4_bytes_supported(void) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")) return 0;
    if (!__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vnni")) return 0;
    return qembed::VNNI | (qembed::has_amx() ? qembed::AMX : 0);
}

// out [rows, outputs] = x [rows, inputs] * weight + bias, both of `dtype`. Returns 1 if the integers cannot be allocated, else 0.
// `values` [panels, inputs / 8, 64] bytes in the layout of int4_bytes.h, `scales` [panels, inputs / group, 16] of `scales_dtype`,
// `zeros` the same shape in bytes, `bias` [outputs] float32 or null. `chunk` divides `group`, is a multiple of 8 and at most 128.
// `digits` 1 or 2 bytes of activations; `instructions` 1 (AVX-512 VNNI) or 2 (AMX), with the same result.
// `parallel` is the GOMP_parallel of torch's OpenMP, or null for one thread.
extern "C" int qembed_int4_bytes_linear(const void *x, void *out, int dtype, int64_t rows, int inputs, int outputs, int group,
                                        int chunk, const uint8_t *values, const void *scales, int scales_dtype,
                                        const uint8_t *zeros, const float *bias, void *parallel, int threads, int digits,
                                        int instructions) {
    using namespace qembed;
    if (rows <= 0) return 0;
    int chunks = inputs / chunk, align = LINES / digits;
    size_t padded = (rows < SLAB_ROWS ? (size_t)rows : SLAB_ROWS) + MAX_ROWS + (size_t)align * (SLAB_ROWS / MAX_ROWS + 1);
    size_t bytes = padded * inputs * digits, constants = padded * chunks * sizeof(float);
    char *scratch = (char *)aligned_alloc(64, (bytes + constants + 63) / 64 * 64);
    if (!scratch) return 1;
    size_t width = dtype == FLOAT32 ? 4 : 2;
    for (int64_t start = 0; start < rows; start += SLAB_ROWS) {
        Slab s = {};
        s.rows = rows - start < SLAB_ROWS ? (int)(rows - start) : SLAB_ROWS;
        s.x = (const char *)x + width * start * inputs;
        s.out = (char *)out + width * start * outputs;
        s.dtype = dtype, s.instructions = instructions, s.digits = digits;
        s.inputs = inputs, s.outputs = outputs, s.group = group, s.chunk = chunk;
        s.tiles = chunk > 64 ? 2 : 1, s.tile_inputs = chunk / s.tiles;
        s.values = values, s.scales = scales, s.scales_dtype = scales_dtype, s.zeros = zeros, s.bias = bias;
        s.lines = (uint8_t *)scratch;
        s.steps = (float *)(scratch + bytes);
        int blocks = ceil_div(s.rows, MAX_ROWS), gangs = ceil_div(ceil_div(outputs, PANEL), GANG);
        s.block_rows = ceil_div(ceil_div(s.rows, blocks), align) * align;
        blocks = ceil_div(s.rows, s.block_rows);
        int parts = ceil_div(threads * 8, blocks);
        s.gangs_per_task = gangs > parts ? gangs / parts : 1;
        s.tasks = blocks * ceil_div(gangs, s.gangs_per_task);
        s.row_tasks = s.rows < 4 * threads ? s.rows : 4 * threads;
        if (parallel && threads > 1) ((Parallel)parallel)(work, &s, (unsigned)threads, 0);
        else work(&s);
    }
    free(scratch);
    return 0;
}

#else

extern "C" int qembed_int4_bytes_supported(void) { return 0; }

extern "C" int qembed_int4_bytes_linear(const void *, void *, int, int64_t, int, int, int, int, const uint8_t *, const void *, int,
                                        const uint8_t *, const float *, void *, int, int, int) {
    return 1;
}

#endif
