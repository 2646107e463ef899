/* Products of a vector with a matrix of 4-bit or 8-bit codes.

   Decoding one token reads every weight once and uses it once, so that its time is the
   time of reading. Codes are unpacked in registers, next to the multiplication: what
   comes from memory is half a byte a weight.

   A group of 4-bit codes lies in group / 2 bytes: byte j holds code j in its low half
   and code j + group / 2 in its high half, so that both halves multiply neighbours.

       w = scale · (u − zero)     y_i = Σ_groups scale · (Σ u x − zero · Σ x)

   What could be summed up once for each group is kept in LANES sums side by side until
   the row ends: adding up the lanes of a register takes as long as a group's products.

   `scale` is float16, or float32 where `wide` is not 0. `zero` is a byte a group; a
   null pointer says that it is 8 everywhere.
*/

#include <stdint.h>
#include <string.h>

/* x86 with AVX2 or AVX-512: LANES bytes become as many integers of 32 bits, the one step
   that compilers do badly by themselves. The rest is arithmetic on vectors. */
#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define WIDEN(u) ((ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(u))))
#elif defined(__AVX2__)
#include <immintrin.h>
#define LANES 8
#define WIDEN(u) ((ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(u))))
#endif

#ifdef LANES
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

static inline floats load(const float *x) {
    floats found;
    memcpy(&found, x, sizeof found);
    return found;
}

static inline floats as_floats(ints codes) {
    return __builtin_convertvector(codes, floats);
}

/* lanes += s · u x for what of a group fills registers; how far that is. */
static inline long add_lanes(floats *lanes, float s, const uint8_t *u, const float *x,
                             long half) {
    floats low = {0}, high = {0};
    long j = 0;
    for (; j + LANES <= half; j += LANES) {
        ints both = WIDEN(u + j);
        low += as_floats(both & 15) * load(x + j);
        high += as_floats(both >> 4) * load(x + j + half);
    }
    *lanes += s * (low + high);
    return j;
}

static inline float sum_of(floats lanes) {
    float sum = 0;
    for (int k = 0; k < LANES; k++) {
        sum += lanes[k];
    }
    return sum;
}
#else /* elsewhere the plain loop in `row_4bit` does it all */
typedef float floats;
#define add_lanes(lanes, s, u, x, half) 0
#define sum_of(lanes) (lanes)
#endif

/* A float16 above 0, or the float32. */
static inline float scale_at(const void *scale, long at, long wide) {
    if (wide) {
        return ((const float *)scale)[at];
    }
    uint16_t half = ((const uint16_t *)scale)[at];
    if (half < 0x400) { /* subnormal */
        return half * 0x1p-24f;
    }
    union {
        uint32_t bits;
        float value;
    } found = {((uint32_t)half << 13) + (112u << 23)};
    return found.value;
}

static inline float zero_at(const uint8_t *zero, long at) {
    return zero ? zero[at] : 8;
}

/* One row times x, from group `at` on. sums: Σ x of each group. */
static float row_4bit(const uint8_t *u, const void *scale, const uint8_t *zero,
                      const float *x, const float *sums, long at, long groups,
                      long half, long wide) {
    floats lanes = {0};
    float total = 0;
    for (long g = 0; g < groups; g++, u += half, x += 2 * half) {
        float s = scale_at(scale, at + g, wide), rest = 0;
        for (long j = add_lanes(&lanes, s, u, x, half); j < half; j++) {
            rest += (float)(u[j] & 15) * x[j] + (float)(u[j] >> 4) * x[j + half];
        }
        total += s * (rest - zero_at(zero, at + g) * sums[g]);
    }
    return total + sum_of(lanes);
}

/* y (rows) = W (rows, columns) x (columns). scale and zero: (rows, columns / group). */
void matvec_4bit(const uint8_t *u, const void *scale, const uint8_t *zero,
                 const float *x, float *y, long rows, long columns, long group,
                 long wide) {
    long groups = columns / group, half = group / 2;
    float sums[groups]; /* the same for every row */
    for (long g = 0; g < groups; g++) {
        sums[g] = 0;
        for (long j = 0; j < group; j++) {
            sums[g] += x[g * group + j];
        }
    }
#pragma omp parallel for schedule(static)
    for (long i = 0; i < rows; i++) {
        const uint8_t *row = u + i * groups * half;
        y[i] = row_4bit(row, scale, zero, x, sums, i * groups, groups, half, wide);
    }
}

/* W (rows, columns) in floats. */
void decode_4bit(const uint8_t *u, const void *scale, const uint8_t *zero, float *w,
                 long rows, long columns, long group, long wide) {
    long groups = columns / group, half = group / 2;
#pragma omp parallel for schedule(static)
    for (long at = 0; at < rows * groups; at++) {
        const uint8_t *codes = u + at * half;
        float *out = w + at * group;
        float s = scale_at(scale, at, wide), z = zero_at(zero, at);
        for (long j = 0; j < half; j++) {
            out[j] = s * ((float)(codes[j] & 15) - z);
            out[j + half] = s * ((float)(codes[j] >> 4) - z);
        }
    }
}

/* y (rows) = W x with a code of 8 bits a weight and a scale a row. */
void matvec_8bit(const int8_t *codes, const float *scale, const float *x, float *y,
                 long rows, long columns) {
#pragma omp parallel for schedule(static)
    for (long i = 0; i < rows; i++) {
        const int8_t *row = codes + i * columns;
        float sum = 0;
        for (long j = 0; j < columns; j++) {
            sum += (float)row[j] * x[j];
        }
        y[i] = scale[i] * sum;
    }
}
