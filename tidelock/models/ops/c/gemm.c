/* Matrix products with plain row-major weights, as training changes them: k ascending for every output in any tile. */
#include "common.h"

INLINE void tile(const int R, long N, long K, const float *A, long ar, long ac, const float *B, long ldb, float *C,
                 long ldc, int add) {
    long n = 0;
    for (; n + 16 <= N; n += 16) {
        v8 c0[6], c1[6];
        for (int r = 0; r < R; r++) {
            c0[r] = add ? load(C + r * ldc + n) : splat(0);
            c1[r] = add ? load(C + r * ldc + n + 8) : splat(0);
        }
        for (long k = 0; k < K; k++) {
            v8 b0 = load(B + k * ldb + n), b1 = load(B + k * ldb + n + 8);
            for (int r = 0; r < R; r++) {
                v8 a = splat(A[r * ar + k * ac]);
                c0[r] = fma8(a, b0, c0[r]);
                c1[r] = fma8(a, b1, c1[r]);
            }
        }
        for (int r = 0; r < R; r++) {
            store(C + r * ldc + n, c0[r]);
            store(C + r * ldc + n + 8, c1[r]);
        }
    }
    for (; n + 8 <= N; n += 8) {
        v8 c0[6];
        for (int r = 0; r < R; r++) c0[r] = add ? load(C + r * ldc + n) : splat(0);
        for (long k = 0; k < K; k++) {
            v8 b0 = load(B + k * ldb + n);
            for (int r = 0; r < R; r++) c0[r] = fma8(splat(A[r * ar + k * ac]), b0, c0[r]);
        }
        for (int r = 0; r < R; r++) store(C + r * ldc + n, c0[r]);
    }
    for (; n < N; n++)
        for (int r = 0; r < R; r++) {
            float c = add ? C[r * ldc + n] : 0;
            for (long k = 0; k < K; k++) c = fmaf(A[r * ar + k * ac], B[k * ldb + n], c);
            C[r * ldc + n] = c;
        }
}

void tl_gemm(long M, long N, long K, const float *A, long ar, long ac, const float *B, long ldb, float *C, long ldc,
             int add) {
    long m = 0;
    for (; m + 6 <= M; m += 6) tile(6, N, K, A + m * ar, ar, ac, B, ldb, C + m * ldc, ldc, add);
    const float *a = A + m * ar;
    float *c = C + m * ldc;
    switch (M - m) {
    case 1: tile(1, N, K, a, ar, ac, B, ldb, c, ldc, add); break;
    case 2: tile(2, N, K, a, ar, ac, B, ldb, c, ldc, add); break;
    case 3: tile(3, N, K, a, ar, ac, B, ldb, c, ldc, add); break;
    case 4: tile(4, N, K, a, ar, ac, B, ldb, c, ldc, add); break;
    case 5: tile(5, N, K, a, ar, ac, B, ldb, c, ldc, add); break;
    }
}

/* out[M,N] = x[M,K] w[K,N] */
void tl_linear(long M, long N, long K, const float *x, const float *w, float *out) {
    long strips = (M + 23) / 24;
#pragma omp parallel for schedule(static) if (M * N * K > 200000)
    for (long i = 0; i < strips; i++) {
        long m = i * 24, rows = M - m < 24 ? M - m : 24;
        tl_gemm(rows, N, K, x + m * K, K, 1, w, N, out + m * N, N, 0);
    }
}

/* Batched over heads: out[n, h, :] = x[n, h, :] w[h] with w[H,K,N]; x rows [H,K], out rows [H,N]. */
void tl_head_linear(long M, long H, long N, long K, const float *x, const float *w, float *out) {
    long strips = (M + 23) / 24;
#pragma omp parallel for schedule(static) collapse(2) if (M * H * N * K > 200000)
    for (long i = 0; i < strips; i++)
        for (long h = 0; h < H; h++) {
            long m = i * 24, rows = M - m < 24 ? M - m : 24;
            tl_gemm(rows, N, K, x + m * H * K + h * K, H * K, 1, w + h * K * N, N, out + m * H * N + h * N, H * N, 0);
        }
}

/* Grouped: rows off[g]..off[g+1] of x times w[g][K,N]; rows are sorted by group (expert). */
void tl_grouped_linear(long G, const int64_t *off, long N, long K, const float *x, const float *w, float *out) {
#pragma omp parallel for schedule(dynamic, 1) if (off[G] * N * K > 200000)
    for (long g = 0; g < G; g++)
        tl_gemm(off[g + 1] - off[g], N, K, x + off[g] * K, K, 1, w + g * K * N, N, out + off[g] * N, N, 0);
}

/* Weight gradient of the above: dw[g][K,N] = x_gT dy_g. */
void tl_grouped_linear_dw(long G, const int64_t *off, long N, long K, const float *x, const float *dy, float *dw) {
#pragma omp parallel for schedule(dynamic, 1) if (off[G] * N * K > 200000)
    for (long g = 0; g < G; g++)
        tl_gemm(K, N, off[g + 1] - off[g], x + off[g] * K, 1, K, dy + off[g] * N, N, dw + g * K * N, N, 0);
}

float *tl_scratch(long n) {
    static __thread float *mine;
    static __thread long room;
    if (n > room) {
        free(mine);
        mine = aligned_alloc(64, (size_t)(n + 15) / 16 * 64);
        room = n;
    }
    return mine;
}
