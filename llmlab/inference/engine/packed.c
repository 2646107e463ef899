/* What a packed model computes in C: products with few rows, and RoPE.

   A product of few rows takes as long as its weight takes to come from memory, if
   nothing else stands in the way. So the weight lies in the order in which it is read.
   It is cut into panels of WIDTH outputs, and a panel holds for each input its WIDTH
   numbers in a row:

       panel p, input i, output j      W[p WIDTH + j][i]

   The sums of a few rows with a panel stay in registers from the first input to the
   last. More rows than that read the panel again, from the cache.
*/

#define WIDTH 32 /* as in packed.py */

#if defined(__AVX512F__)
#define LANES 16 /* floats in a register */
#define ROWS 12 /* whose sums have room in the registers: 12 x 2 of 32 */
#elif defined(__AVX__)
#define LANES 8
#define ROWS 3 /* 3 x 4 of 16 */
#else
#define LANES 4
#define ROWS 3 /* 3 x 8 of 32 */
#endif
#define PARTS (WIDTH / LANES)

typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4)));

/* R rows of x with one panel; the first `columns` sums of each are written. Where R is a
   constant, the loops over it become registers. */
static inline __attribute__((always_inline)) void
few_rows(const float *x, const float *panel, float *y, long in, long out, long columns,
         const int R) {
    Lanes sums[12][PARTS] = {0};
    for (long i = 0; i < in; i++) {
        const Lanes *w = (const Lanes *)(panel + i * WIDTH);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            float value = x[r * in + i];
#pragma GCC unroll 8
            for (int part = 0; part < PARTS; part++) {
                sums[r][part] += value * w[part];
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
        float row[WIDTH];
#pragma GCC unroll 8
        for (int part = 0; part < PARTS; part++) {
            ((Lanes *)row)[part] = sums[r][part];
        }
        for (long j = 0; j < columns; j++) {
            y[r * out + j] = row[j];
        }
    }
}

/* y (rows, out) = x (rows, in) W^T; the last panel may be wider than what is left. */
void product(const float *x, const float *panels, float *y, long rows, long in,
             long out) {
    long count = (out + WIDTH - 1) / WIDTH;
    long turns = (rows + ROWS - 1) / ROWS, step = (rows + turns - 1) / turns;
#pragma omp parallel for schedule(static)
    for (long p = 0; p < count; p++) {
        const float *panel = panels + p * in * WIDTH;
        long left = out - p * WIDTH, columns = left < WIDTH ? left : WIDTH;
        for (long r = 0; r < rows; r += step) {
            const float *from = x + r * in;
            float *to = y + r * out + p * WIDTH;
            switch (rows - r < step ? rows - r : step) {
#define CASE(R)                                                                        \
    case R:                                                                            \
        few_rows(from, panel, to, in, out, columns, R);                                \
        break
                CASE(1);
                CASE(2);
                CASE(3);
                CASE(4);
                CASE(5);
                CASE(6);
                CASE(7);
                CASE(8);
                CASE(9);
                CASE(10);
                CASE(11);
                CASE(12);
            }
        }
    }
}

/* RoPE, in place, on the first heads of each row: channel i turns with i + D / 2.
   x (rows, stride); cosine and sine (rows, D). */
void rotate(float *x, const float *cosine, const float *sine, long rows, long heads,
            long D, long stride) {
    long half = D / 2;
#pragma omp parallel for if (rows > 16)
    for (long r = 0; r < rows; r++) {
        const float *c = cosine + r * D, *s = sine + r * D;
        for (long n = 0; n < heads; n++) {
            float *first = x + r * stride + n * D, *second = first + half;
            for (long i = 0; i < half; i++) {
                float a = first[i], b = second[i];
                first[i] = a * c[i] - b * s[i];
                second[i] = b * c[i + half] + a * s[i + half];
            }
        }
    }
}
