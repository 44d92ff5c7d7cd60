/* Weights as serving keeps them: in panels of 32 outputs, k after k, so that a product streams memory once in order.
 * `ops/packed.py` writes this layout.
 *
 * A row k of a panel: fp32 and fp16, 32 numbers in order; bf16, 16 words of (output i, output i + 16 in the high half).
 * Codes are in words of 32 bits, one an output, so that taking them out is a shift and a mask in its own lane: a row of 32
 * words holds the inputs 4k.. (int8, plus 128) or 8k.. (int4, plus 8, and mxfp4), the first in the lowest bits. */
#pragma once
#include "common.h"

#define PANEL 32
#define GROUP 32 /* inputs that share a scale in the 4-bit kinds */

enum { F32, BF16, F16, INT8, INT4, MXFP4 };

typedef struct {
    int32_t kind;
    int32_t panels; /* of one matrix: ceil(n / 32), the last one padded with zeros */
    int64_t n, k;   /* outputs, inputs */
    const char *w;     /* [matrices, panels, rows, 64 or 128 bytes] */
    const char *scale; /* int8: fp32 [matrices, panels, 32]; 4-bit: [matrices, panels, k / 32, 32] as bf16 rows; else NULL */
} Weight;

/* out[m, :] = x[m, :] W of matrix e, for rows of x with stride xr and of out with stride outr. Runs on this thread. */
void tl_product(long M, const float *x, long xr, const Weight *w, long e, float *out, long outr, long panel, long upto);
/* The same over all panels, by all threads if there is work for them. */
void tl_packed_linear(long M, const float *x, long xr, const Weight *w, float *out, long outr);
/* x and out rows hold H parts; part h meets matrix h. */
void tl_packed_head_linear(long M, const float *x, long xr, const Weight *w, long H, float *out, long outr, long part);
/* Rows off[g]..off[g+1] meet matrix g of G. */
void tl_packed_grouped_linear(long G, const int64_t *off, const float *x, const Weight *w, float *out);
