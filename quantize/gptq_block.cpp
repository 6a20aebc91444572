// A block of columns of GPTQ, behind a plain C interface that gptq_block.py loads with ctypes.
//
// A column is rounded after the errors of the columns before it, in their order, are subtracted from it. Every row is
// independent of the others, so a thread takes ROWS rows through all columns: their errors stay in the core's cache, and the
// column at hand in registers. All steps are single float32 operations, in the order of the same loop in torch: built without
// fused multiply-add (-ffp-contract=off), the results are equal bit for bit.

#include <stdint.h>
#include <string.h>

namespace {

constexpr int VECTOR = 8;                 // floats
constexpr int VECTORS = 4;                // as many chains of subtractions as hide their latency
constexpr int ROWS = VECTOR * VECTORS;
constexpr int MAX_COLUMNS = 128;
constexpr float MAX_LEVEL = 15.0f;
constexpr float ROUND = 12582912.0f;      // 1.5 * 2^23: adding and subtracting it rounds to an integer, halves to even

typedef float Vector __attribute__((vector_size(VECTOR * sizeof(float))));
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

// Shared by all threads that round one block.
struct Block {
    float *values, *levels;
    int columns;
    int64_t rows;
    const float *factor, *scales, *zeros;
    const int64_t *groups;
    int64_t next;
};

inline __attribute__((always_inline)) void round_rows(const Block *b, int64_t first) {
    alignas(64) Vector errors[MAX_COLUMNS][VECTORS];
    int64_t count = b->rows - first < ROWS ? b->rows - first : ROWS;
    size_t bytes = (size_t)count * sizeof(float);
    Vector scales[VECTORS] = {}, zeros[VECTORS] = {}, values[VECTORS] = {}, levels[VECTORS];
    for (int i = 0; i < VECTORS; i++) scales[i] += 1.0f;  // rows beyond the last one divide by it
    for (int column = 0; column < b->columns; column++) {
        const float *factor = b->factor + (int64_t)column * b->columns;
        int64_t group = b->groups[column] * b->rows + first, at = column * b->rows + first;
        memcpy(values, b->values + at, bytes);
        memcpy(scales, b->scales + group, bytes);
        memcpy(zeros, b->zeros + group, bytes);
        Vector v0 = values[0], v1 = values[1], v2 = values[2], v3 = values[3];
        for (int before = 0; before < column; before++) {
            const Vector *error = errors[before];
            v0 -= factor[before] * error[0];
            v1 -= factor[before] * error[1];
            v2 -= factor[before] * error[2];
            v3 -= factor[before] * error[3];
        }
        values[0] = v0, values[1] = v1, values[2] = v2, values[3] = v3;
        for (int i = 0; i < VECTORS; i++) {
            Vector low = -zeros[i], high = MAX_LEVEL - zeros[i], step = values[i] / scales[i];
            step = step < low ? low : step;
            step = step > high ? high : step;
            step = (step + ROUND) - ROUND;
            errors[column][i] = (values[i] - step * scales[i]) / factor[column];
            levels[i] = step + zeros[i];
        }
        memcpy(b->values + at, errors[column], bytes);
        memcpy(b->levels + at, levels, bytes);
    }
}

inline __attribute__((always_inline)) void take_rows(Block *b) {
    for (;;) {
        int64_t first = __atomic_fetch_add(&b->next, ROWS, __ATOMIC_RELAXED);
        if (first >= b->rows) return;
        round_rows(b, first);
    }
}

void work(void *block) { take_rows((Block *)block); }

#if defined(__x86_64__)
__attribute__((target("avx2"))) void work_avx2(void *block) { take_rows((Block *)block); }
#endif

}  // namespace

// Rounds `values` [columns, rows], at most 128 columns, to `levels` [columns, rows], and replaces them by their errors divided
// by the diagonal of `factor` [columns, columns], whose rows are those of the lower triangular transpose of GPTQ's factor.
// `scales` and `zeros` [groups, rows]; `groups` [columns] is the group of each column. `parallel` is the GOMP_parallel of
// torch's OpenMP, or null for one thread. Returns 1 if there are too many columns, else 0.
extern "C" int qembed_gptq_block(float *values, float *levels, int columns, int64_t rows, const float *factor,
                                 const float *scales, const float *zeros, const int64_t *groups, void *parallel, int threads) {
    if (columns > MAX_COLUMNS) return 1;
    Block block = {values, levels, columns, rows, factor, scales, zeros, groups, 0};
    void (*function)(void *) = work;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) function = work_avx2;
#endif
    if (parallel && threads > 1) ((Parallel)parallel)(function, &block, (unsigned)threads, 0);
    else function(&block);
    return 0;
}
