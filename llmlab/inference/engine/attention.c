/* Attention of one query per row over keys and values that lie in blocks.

   The blocks are read where they are: gathering them first would read and write all
   of them once more. Token j of row r lies in block table[r][j / b], at place j mod b;
   its key for one head is D numbers in a row.

       s_j = q k_j / sqrt(D)      p = exp(s - max s)      o = sum p_j v_j / sum p_j

   The G query heads that share a key/value head are computed together, so that each
   block comes from memory once.
*/

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

/* e^x for x <= 0, to about 1e-7 of its value. No branches, so that a loop over it runs
   in vector registers: 2^n times a polynomial of the rest, |rest| <= ln 2 / 2. */
static inline float exp_(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.69314718f;
    float p = 1.0f / 5040.0f;
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    union { int32_t bits; float value; } power = {((int32_t)n + 127) << 23};
    return p * power.value;
}

/* One row and the G query heads of one key/value head. q and out: G D numbers; keys and
   values begin with this head's part of block 0; scores: room for G x length. Where D is
   a constant, the loops over it become a few registers. */
static inline __attribute__((always_inline)) void
one_group(const float *q, const float *keys, const float *values, const int64_t *table,
          long length, float *out, float *scores, long b, long K, long D, long G) {
    float scale = 1.0f / sqrtf((float)D);
    for (long start = 0; start < length; start += b) {
        const float *block = keys + table[start / b] * b * K * D;
        long stop = length - start < b ? length - start : b;
        for (long g = 0; g < G; g++) {
            for (long i = 0; i < stop; i++) {
                float dot = 0;
                for (long d = 0; d < D; d++) {
                    dot += q[g * D + d] * block[i * K * D + d];
                }
                scores[g * length + start + i] = dot * scale;
            }
        }
    }
    float sums[G];
    for (long g = 0; g < G; g++) {
        float *s = scores + g * length;
        float most = -INFINITY, sum = 0;
        for (long j = 0; j < length; j++) {
            most = s[j] > most ? s[j] : most;
        }
        for (long j = 0; j < length; j++) {
            s[j] = exp_(s[j] - most);
            sum += s[j];
        }
        sums[g] = sum;
    }
    for (long at = 0; at < G * D; at++) {
        out[at] = 0;
    }
    for (long start = 0; start < length; start += b) {
        const float *block = values + table[start / b] * b * K * D;
        long stop = length - start < b ? length - start : b;
        for (long g = 0; g < G; g++) {
            float sum[D]; /* in registers while a block is read */
            for (long d = 0; d < D; d++) {
                sum[d] = out[g * D + d];
            }
            for (long i = 0; i < stop; i++) {
                float p = scores[g * length + start + i];
                for (long d = 0; d < D; d++) {
                    sum[d] += p * block[i * K * D + d];
                }
            }
            for (long d = 0; d < D; d++) {
                out[g * D + d] = sum[d];
            }
        }
    }
    for (long g = 0; g < G; g++) {
        for (long d = 0; d < D; d++) {
            out[g * D + d] /= sums[g];
        }
    }
}

/* q, out (R, H, D); keys, values (N, b, K, D); tables (R, M); lengths (R). */
void paged_attention(const float *q, const float *keys, const float *values,
                     const int64_t *tables, const int64_t *lengths, float *out, long R,
                     long H, long K, long D, long b, long M) {
    long G = H / K;
#pragma omp parallel
    {
        float *scores = malloc(sizeof(float) * G * M * b);
#pragma omp for schedule(dynamic)
        for (long at = 0; at < R * K; at++) {
            long r = at / K, k = at % K;
            long first = (r * H + k * G) * D;
            const float *own_keys = keys + k * D, *own_values = values + k * D;
            const int64_t *table = tables + r * M;
            if (D == 64) {
                one_group(q + first, own_keys, own_values, table, lengths[r],
                          out + first, scores, b, K, 64, G);
            } else if (D == 128) {
                one_group(q + first, own_keys, own_values, table, lengths[r],
                          out + first, scores, b, K, 128, G);
            } else {
                one_group(q + first, own_keys, own_values, table, lengths[r],
                          out + first, scores, b, K, D, G);
            }
        }
        free(scores);
    }
}
