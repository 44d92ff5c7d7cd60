/* What every kernel file shares: the vector types, fused products by name, exp, log and sigmoid.
 *
 * One rule shapes every loop: a row's result is computed from that row alone, in an order that does not depend on how
 * many rows came along. A token therefore gets the same bits in a packed training batch, a prefill chunk and a decode
 * step, and training's log-probabilities equal the served ones exactly. Reductions over rows (weight gradients) use a
 * fixed number of blocks, so they do not depend on the thread count either.
 *
 * Plain C with GCC vector extensions (AVX2, AVX-512 and NEON all compile); OpenMP symbols come from PyTorch's runtime.
 * Compiled with -ffp-contract=off: a product is fused where the source says `fma8` or `fmaf` and nowhere else. Left to
 * the compiler, two copies of one loop may differ in it, and a row's last bits depend on how many rows came along.
 * Packed layout: sequence s owns rows cu[s]..cu[s+1]; start[s] tokens of it are already in the cache.
 */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

typedef float v8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4)));
#define INLINE static inline __attribute__((always_inline))
#define BLOCKS 16
#define MIN(a, b) ((a) < (b) ? (a) : (b))

INLINE v8 load(const float *p) { return *(const v8 *)p; }
INLINE void store(float *p, v8 x) { *(v8 *)p = x; }
INLINE v8 splat(float x) { return (v8){x, x, x, x, x, x, x, x}; }
/* a * b + c in one rounding. */
INLINE v8 fma8(v8 a, v8 b, v8 c) {
#ifdef __FMA__
    return (v8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    for (int i = 0; i < 8; i++) c[i] = fmaf(a[i], b[i], c[i]);
    return c;
#endif
}
INLINE float hsum(v8 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
INLINE v8 pick(i8 mask, v8 a, v8 b) { return (v8)(((i8)a & mask) | ((i8)b & ~mask)); }

/* The machine's widest vector, for loops whose lanes are separate results: there the width is no part of the sum. */
#ifdef __AVX512F__
#define VW 16
typedef float vw __attribute__((vector_size(64), aligned(4)));
INLINE vw fmaw(vw a, vw b, vw c) { return (vw)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE vw splatw(float x) { return (vw)_mm512_set1_ps(x); }
#else
#define VW 8
typedef v8 vw;
INLINE vw fmaw(vw a, vw b, vw c) { return fma8(a, b, c); }
INLINE vw splatw(float x) { return splat(x); }
#endif
typedef int32_t iw __attribute__((vector_size(VW * 4), aligned(4)));
INLINE vw loadw(const float *p) { return *(const vw *)p; }
INLINE void storew(float *p, vw x) { *(vw *)p = x; }

INLINE vw pickw(iw mask, vw a, vw b) { return (vw)(((iw)a & mask) | ((iw)b & ~mask)); }

/* exp to 1-2 ulp on [-87, 88], clamped outside (Cephes polynomial): vexp of 8 lanes, vexpw of VW. */
#define EXP(name, vector, ints, fill, fused, pick)                                                                     \
    INLINE vector name(vector x) {                                                                                     \
        x = pick(x > fill(88.0f), fill(88.0f), x);                                                                     \
        x = pick(x < fill(-87.0f), fill(-87.0f), x);                                                                   \
        vector n = fused(x, fill(1.44269504088896341f), fill(12582912.0f)) - fill(12582912.0f);                        \
        vector r = fused(n, fill(-0.693359375f), x);                                                                   \
        r = fused(n, fill(2.12194440e-4f), r);                                                                         \
        vector p = fill(1.9875691500e-4f);                                                                             \
        p = fused(p, r, fill(1.3981999507e-3f));                                                                       \
        p = fused(p, r, fill(8.3334519073e-3f));                                                                       \
        p = fused(p, r, fill(4.1665795894e-2f));                                                                       \
        p = fused(p, r, fill(1.6666665459e-1f));                                                                       \
        p = fused(p, r, fill(5.0000001201e-1f));                                                                       \
        vector y = fused(p, r * r, r) + fill(1.0f);                                                                    \
        ints e = (__builtin_convertvector(n, ints) + 127) << 23;                                                       \
        return y * (vector)e;                                                                                          \
    }
EXP(vexp, v8, i8, splat, fma8, pick)
EXP(vexpw, vw, iw, splatw, fmaw, pickw)
INLINE v8 vsigmoid(v8 x) { return splat(1.0f) / (splat(1.0f) + vexp(-x)); }
/* tanh to a few ulp: a polynomial near zero (Cephes), where 2 sigmoid(2x) - 1 would cancel all its digits. */
INLINE v8 vtanh(v8 x) {
    v8 z = x * x, p = splat(-5.70498872745e-3f);
    p = fma8(p, z, splat(2.06390887954e-2f));
    p = fma8(p, z, splat(-5.37397155531e-2f));
    p = fma8(p, z, splat(1.33314422036e-1f));
    p = fma8(p, z, splat(-3.33332819422e-1f));
    return pick(z < splat(0.625f * 0.625f), fma8(x * z, p, x), splat(2.0f) * vsigmoid(x + x) - splat(1.0f));
}
/* log to 1-2 ulp for normal positive x (Cephes polynomial). */
INLINE v8 vlog(v8 x) {
    i8 bits = (i8)x;
    v8 e = __builtin_convertvector((bits >> 23) - 126, v8);
    v8 m = (v8)((bits & 0x007fffff) | 0x3f000000); /* in [0.5, 1) */
    i8 low = m < splat(0.70710678118654752f);
    e = pick(low, e - splat(1.0f), e);
    m = pick(low, m + m, m) - splat(1.0f);
    v8 p = splat(7.0376836292e-2f), z = m * m;
    p = fma8(p, m, splat(-1.1514610310e-1f));
    p = fma8(p, m, splat(1.1676998740e-1f));
    p = fma8(p, m, splat(-1.2420140846e-1f));
    p = fma8(p, m, splat(1.4249322787e-1f));
    p = fma8(p, m, splat(-1.6668057665e-1f));
    p = fma8(p, m, splat(2.0000714765e-1f));
    p = fma8(p, m, splat(-2.4999993993e-1f));
    p = fma8(p, m, splat(3.3333331174e-1f));
    v8 y = fma8(z, splat(-0.5f), fma8(p * m, z, e * splat(-2.12194440e-4f)));
    return fma8(e, splat(0.693359375f), m + y);
}
/* log(1 + t) without losing small t: the rounding of 1 + t is divided out again. */
INLINE v8 vlog1p(v8 t) {
    v8 u = splat(1.0f) + t;
    return pick(u == splat(1.0f), t, vlog(u) * t / pick(u == splat(1.0f), splat(1.0f), u - splat(1.0f)));
}
INLINE v8 vsoftplus(v8 x) {
    v8 a = pick(x > splat(0), x, -x);
    return pick(x > splat(0), x, splat(0)) + vlog1p(vexp(-a));
}
INLINE float sigmoid1(float x) { return vsigmoid(splat(x))[0]; }

/* C[M,N] (+)= A[M,K] B[K,N] (gemm.c). A is read as A[m * ar + k * ac]. */
void tl_gemm(long M, long N, long K, const float *A, long ar, long ac, const float *B, long ldb, float *C, long ldc,
             int add);

/* This thread's scratch memory, at least n floats, until the next call on the same thread (gemm.c). */
float *tl_scratch(long n);
