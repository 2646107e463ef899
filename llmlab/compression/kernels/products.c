/* Products of a vector with a matrix of 4-bit or 8-bit codes.

   Decoding one token reads every weight once and uses it once, so that its time is the
   time of reading. Codes are unpacked in registers, next to the multiplication: what
   comes from memory is half a byte a weight.

   A group of 4-bit codes lies in group / 2 bytes: byte j holds code j in its low half
   and code j + group / 2 in its high half, so that both halves multiply neighbours.

       w = scale · (u − zero)     y_i = Σ_groups scale · (Σ u x − zero · Σ x)
*/

#include <stdint.h>

static float dot_4bit(const uint8_t *u, const float *x, long half) {
    float sum = 0;
    for (long j = 0; j < half; j++) {
        sum += (float)(u[j] & 15) * x[j] + (float)(u[j] >> 4) * x[j + half];
    }
    return sum;
}

/* y (rows) = W (rows, columns) x (columns). scale and zero: (rows, columns / group). */
void matvec_4bit(const uint8_t *u, const float *scale, const float *zero,
                 const float *x, float *y, long rows, long columns, long group) {
    long groups = columns / group;
    float sums[groups]; /* Σ x of each group, the same for every row */
    for (long g = 0; g < groups; g++) {
        sums[g] = 0;
        for (long j = 0; j < group; j++) {
            sums[g] += x[g * group + j];
        }
    }
#pragma omp parallel for schedule(static)
    for (long i = 0; i < rows; i++) {
        const uint8_t *row = u + i * (columns / 2);
        float total = 0;
        for (long g = 0; g < groups; g++) {
            float dot = dot_4bit(row + g * (group / 2), x + g * group, group / 2);
            long at = i * groups + g;
            total += scale[at] * (dot - zero[at] * sums[g]);
        }
        y[i] = total;
    }
}

/* W (rows, columns) in floats. */
void decode_4bit(const uint8_t *u, const float *scale, const float *zero, float *w,
                 long rows, long columns, long group) {
    long groups = columns / group, half = group / 2;
#pragma omp parallel for schedule(static)
    for (long at = 0; at < rows * groups; at++) {
        const uint8_t *codes = u + at * half;
        float *out = w + at * group;
        for (long j = 0; j < half; j++) {
            out[j] = scale[at] * ((float)(codes[j] & 15) - zero[at]);
            out[j + half] = scale[at] * ((float)(codes[j] >> 4) - zero[at]);
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
