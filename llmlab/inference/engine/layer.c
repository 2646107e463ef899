/* What stands between the large products of a layer, each in one pass over its numbers.

   With one token in a batch a layer is a dozen products and steps of a few microseconds
   each, so that starting them takes as long as doing them.
*/

#include <math.h>
#include <stdint.h>

#include "exp.h"

/* h (rows, d) += x, where there is an x; out = h / rms(h) * weight. */
void add_rms_norm(float *h, const float *x, const float *weight, float *out, long rows,
                  long d, float eps) {
#pragma omp parallel for if (rows > 16)
    for (long r = 0; r < rows; r++) {
        float *row = h + r * d, *to = out + r * d, sum = 0;
        if (x) {
            for (long i = 0; i < d; i++) {
                row[i] += x[r * d + i];
            }
        }
        for (long i = 0; i < d; i++) {
            sum += row[i] * row[i];
        }
        float scale = 1.0f / sqrtf(sum / d + eps);
        for (long i = 0; i < d; i++) {
            to[i] = row[i] * scale * weight[i];
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

/* silu(gate) * up, with gate and up side by side: x (rows, 2 f), out (rows, f). */
void swiglu(const float *x, float *out, long rows, long f) {
#pragma omp parallel for if (rows > 16)
    for (long r = 0; r < rows; r++) {
        const float *gate = x + r * 2 * f, *up = gate + f;
        for (long i = 0; i < f; i++) {
            out[r * f + i] = gate[i] / (1.0f + exp_(-gate[i])) * up[i];
        }
    }
}
