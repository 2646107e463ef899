/* The passes of a fused Llama layer, each over the tokens once.

   Between two matrix products a layer does little arithmetic on many numbers. Each of
   these functions reads them once and writes them once, with all that happens between
   two products in registers. Shapes are those of pieces.py.
*/

#include <math.h>
#include <stdint.h>
#include <string.h>

#define MANY (1 << 16) /* numbers from which on several threads are worth it */

/* e^x, to about one unit of the last place: 2^n times a polynomial. A call of expf would
   keep the loop from running in vector registers. */
static inline float e_to(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = __builtin_fmaf(n, -0.693145752f, x);
    r = __builtin_fmaf(n, -1.42860677e-6f, r);
    float p = 1.38888890e-3f;
    p = __builtin_fmaf(p, r, 8.33333377e-3f);
    p = __builtin_fmaf(p, r, 4.16666679e-2f);
    p = __builtin_fmaf(p, r, 1.66666672e-1f);
    p = __builtin_fmaf(p, r, 0.5f);
    p = __builtin_fmaf(p, r, 1.0f);
    p = __builtin_fmaf(p, r, 1.0f);
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

/* residual += x, in place; y = residual / rms(residual) · weight. x may be missing. */
void add_rms_norm(const float *x, float *residual, const float *weight, float *y,
                  long rows, long d, float eps) {
#pragma omp parallel for schedule(static) if (rows * d > MANY)
    for (long n = 0; n < rows; n++) {
        float *r = residual + n * d, *out = y + n * d;
        float sum = 0;
        if (x) {
            const float *add = x + n * d;
            for (long i = 0; i < d; i++) {
                r[i] += add[i];
                sum += r[i] * r[i];
            }
        } else {
            for (long i = 0; i < d; i++) {
                sum += r[i] * r[i];
            }
        }
        float scale = 1.0f / sqrtf(sum / (float)d + eps);
        for (long i = 0; i < d; i++) {
            out[i] = weight[i] * (r[i] * scale);
        }
    }
}

static inline void turn(const float *x, const float *cos, const float *sin, float *out,
                        long half) {
    for (long i = 0; i < half; i++) {
        out[i] = x[i] * cos[i] - x[i + half] * sin[i];
        out[i + half] = x[i + half] * cos[i] + x[i] * sin[i];
    }
}

/* qkv (B·T, (H + 2K)·D) → q (B, T, H, D), keys and values (B, K, capacity, D) at start.
   cos and sin: (B·T, D/2). */
void rope_and_store(const float *qkv, const float *cos, const float *sin, float *q,
                    float *keys, float *values, long B, long T, long H, long K, long D,
                    long capacity, long start) {
    long half = D / 2, row = (H + 2 * K) * D;
#pragma omp parallel for schedule(static) if (B * T * row > MANY)
    for (long n = 0; n < B * T; n++) {
        long b = n / T, t = n % T;
        const float *from = qkv + n * row;
        const float *c = cos + n * half, *s = sin + n * half;
        for (long h = 0; h < H; h++) {
            turn(from + h * D, c, s, q + (n * H + h) * D, half);
        }
        for (long h = 0; h < K; h++) {
            long place = ((b * K + h) * capacity + start + t) * D;
            turn(from + (H + h) * D, c, s, keys + place, half);
            memcpy(values + place, from + (H + K + h) * D, D * sizeof(float));
        }
    }
}

/* gate_up (rows, 2f) → silu(gate) · up, (rows, f). */
void swiglu(const float *gate_up, float *y, long rows, long f) {
#pragma omp parallel for schedule(static) if (rows * f > MANY)
    for (long n = 0; n < rows; n++) {
        const float *restrict gate = gate_up + n * 2 * f, *restrict up = gate + f;
        float *restrict out = y + n * f;
        for (long i = 0; i < f; i++) {
            out[i] = gate[i] / (1.0f + e_to(-gate[i])) * up[i];
        }
    }
}

/* y (N, rows) = x (N, columns) Wᵀ, W in codes of 8 bits and a scale a row. A row of W is
   read from memory once, however many tokens there are. */
void linear_8bit(const int8_t *codes, const float *scale, const float *x, float *y,
                 long N, long rows, long columns) {
#pragma omp parallel for schedule(static) if (rows * columns > MANY)
    for (long i = 0; i < rows; i++) {
        const int8_t *w = codes + i * columns;
        for (long n = 0; n < N; n++) {
            const float *from = x + n * columns;
            float sum = 0;
            for (long j = 0; j < columns; j++) {
                sum += (float)w[j] * from[j];
            }
            y[n * rows + i] = scale[i] * sum;
        }
    }
}
