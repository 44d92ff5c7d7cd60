/* The model's forward kernels for CPUs, and the backward of those PyTorch has no good primitive for.
 *
 * One rule shapes every loop: a row's result is computed from that row alone, in an order that does not depend on how
 * many rows came along. A token therefore gets the same bits in a packed training batch, a prefill chunk and a decode
 * step, and training's log-probabilities equal the served ones exactly. Reductions over rows (weight gradients) use a
 * fixed number of blocks, so they do not depend on the thread count either.
 *
 * Plain C with GCC vector extensions (AVX2, AVX-512 and NEON all compile); OpenMP symbols come from PyTorch's runtime.
 * Packed layout: sequence s owns rows cu[s]..cu[s+1]; start[s] tokens of it are already in the cache.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef float v8 __attribute__((vector_size(32), aligned(4)));
typedef int32_t i8 __attribute__((vector_size(32), aligned(4)));
#define INLINE static inline __attribute__((always_inline))
#define BLOCKS 16

INLINE v8 load(const float *p) { return *(const v8 *)p; }
INLINE void store(float *p, v8 x) { *(v8 *)p = x; }
/* a * b + c in one rounding, by name: left to the compiler, whether a product is fused may differ between two copies of
 * one loop, and a row's last bits would depend on how many rows came along. */
#ifdef __FMA__
#include <immintrin.h>
INLINE v8 fma8(v8 a, v8 b, v8 c) { return (v8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
INLINE v8 fma8(v8 a, v8 b, v8 c) {
    for (int i = 0; i < 8; i++) c[i] = fmaf(a[i], b[i], c[i]);
    return c;
}
#endif
INLINE v8 splat(float x) { return (v8){x, x, x, x, x, x, x, x}; }
INLINE float hsum(v8 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
INLINE v8 pick(i8 mask, v8 a, v8 b) { return (v8)(((i8)a & mask) | ((i8)b & ~mask)); }

/* exp to 1-2 ulp on [-87, 88], clamped outside (Cephes polynomial). */
INLINE v8 vexp(v8 x) {
    x = pick(x > splat(88.0f), splat(88.0f), x);
    x = pick(x < splat(-87.0f), splat(-87.0f), x);
    v8 n = (x * splat(1.44269504088896341f) + splat(12582912.0f)) - splat(12582912.0f);
    v8 r = x - n * splat(0.693359375f);
    r = r - n * splat(-2.12194440e-4f);
    v8 p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    v8 y = p * (r * r) + r + splat(1.0f);
    i8 e = (__builtin_convertvector(n, i8) + 127) << 23;
    return y * (v8)e;
}
INLINE v8 vsigmoid(v8 x) { return splat(1.0f) / (splat(1.0f) + vexp(-x)); }
INLINE v8 vtanh(v8 x) { return splat(2.0f) * vsigmoid(x + x) - splat(1.0f); }
/* log to 1-2 ulp for normal positive x (Cephes polynomial). */
INLINE v8 vlog(v8 x) {
    i8 bits = (i8)x;
    v8 e = __builtin_convertvector((bits >> 23) - 126, v8);
    v8 m = (v8)((bits & 0x007fffff) | 0x3f000000); /* in [0.5, 1) */
    i8 low = m < splat(0.70710678118654752f);
    e = pick(low, e - splat(1.0f), e);
    m = pick(low, m + m, m) - splat(1.0f);
    v8 p = splat(7.0376836292e-2f), z = m * m;
    p = p * m + splat(-1.1514610310e-1f);
    p = p * m + splat(1.1676998740e-1f);
    p = p * m + splat(-1.2420140846e-1f);
    p = p * m + splat(1.4249322787e-1f);
    p = p * m + splat(-1.6668057665e-1f);
    p = p * m + splat(2.0000714765e-1f);
    p = p * m + splat(-2.4999993993e-1f);
    p = p * m + splat(3.3333331174e-1f);
    v8 y = p * m * z + e * splat(-2.12194440e-4f) - z * splat(0.5f);
    return m + y + e * splat(0.693359375f);
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

/* ---- GEMM: C[M,N] (+)= A[M,K] B[K,N], k ascending for every output ---------------------------------------------- */

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

static void gemm(long M, long N, long K, const float *A, long ar, long ac, const float *B, long ldb, float *C, long ldc,
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
        gemm(rows, N, K, x + m * K, K, 1, w, N, out + m * N, N, 0);
    }
}

/* Batched over heads: out[n, h, :] = x[n, h, :] w[h] with w[H,K,N]; x rows [H,K], out rows [H,N]. */
void tl_head_linear(long M, long H, long N, long K, const float *x, const float *w, float *out) {
    long strips = (M + 23) / 24;
#pragma omp parallel for schedule(static) collapse(2) if (M * H * N * K > 200000)
    for (long i = 0; i < strips; i++)
        for (long h = 0; h < H; h++) {
            long m = i * 24, rows = M - m < 24 ? M - m : 24;
            gemm(rows, N, K, x + m * H * K + h * K, H * K, 1, w + h * K * N, N, out + m * H * N + h * N, H * N, 0);
        }
}

/* Grouped: rows off[g]..off[g+1] of x times w[g][K,N]; rows are sorted by group (expert). */
void tl_grouped_linear(long G, const int64_t *off, long N, long K, const float *x, const float *w, float *out) {
#pragma omp parallel for schedule(dynamic, 1) if (off[G] * N * K > 200000)
    for (long g = 0; g < G; g++)
        gemm(off[g + 1] - off[g], N, K, x + off[g] * K, K, 1, w + g * K * N, N, out + off[g] * N, N, 0);
}

/* Weight gradient of the above: dw[g][K,N] = x_gT dy_g. */
void tl_grouped_linear_dw(long G, const int64_t *off, long N, long K, const float *x, const float *dy, float *dw) {
#pragma omp parallel for schedule(dynamic, 1) if (off[G] * N * K > 200000)
    for (long g = 0; g < G; g++)
        gemm(K, N, off[g + 1] - off[g], x + off[g] * K, 1, K, dy + off[g] * N, N, dw + g * K * N, N, 0);
}

/* ---- RMSNorm, optionally times sigmoid(gate): y = x / rms(x) * w [* sigmoid(g)] ---------------------------------- */

void tl_rmsnorm(long M, long D, const float *x, const float *w, const float *gate, float eps, float *y, float *rstd) {
#pragma omp parallel for schedule(static) if (M * D > 20000)
    for (long m = 0; m < M; m++) {
        const float *xr = x + m * D;
        v8 s = splat(0);
        for (long d = 0; d < D; d += 8) s += load(xr + d) * load(xr + d);
        float r = 1.0f / sqrtf(hsum(s) / D + eps);
        rstd[m] = r;
        for (long d = 0; d < D; d += 8) {
            v8 v = load(xr + d) * splat(r) * load(w + d);
            if (gate) v = v * vsigmoid(load(gate + m * D + d));
            store(y + m * D + d, v);
        }
    }
}

/* dw holds BLOCKS partial sums of D each; the caller adds them in order. */
void tl_rmsnorm_bwd(long M, long D, const float *x, const float *w, const float *gate, const float *rstd, const float *dy,
                    float *dx, float *dgate, float *dw) {
    long step = (M + BLOCKS - 1) / BLOCKS;
#pragma omp parallel for schedule(static) if (M * D > 20000)
    for (long b = 0; b < BLOCKS; b++) {
        float *dwb = dw + b * D;
        memset(dwb, 0, D * sizeof(float));
        for (long m = b * step; m < (b + 1) * step && m < M; m++) {
            const float *xr = x + m * D, *dyr = dy + m * D;
            v8 r = splat(rstd[m]), dot = splat(0);
            for (long d = 0; d < D; d += 8) {
                v8 xh = load(xr + d) * r, g = load(dyr + d), wv = load(w + d);
                if (gate) {
                    v8 s = vsigmoid(load(gate + m * D + d));
                    store(dgate + m * D + d, g * xh * wv * s * (splat(1) - s));
                    g = g * s;
                }
                store(dwb + d, load(dwb + d) + g * xh);
                g = g * wv;
                dot += g * xh;
                store(dx + m * D + d, g);
            }
            v8 c = splat(hsum(dot) / D);
            for (long d = 0; d < D; d += 8) {
                v8 xh = load(xr + d) * r;
                store(dx + m * D + d, (load(dx + m * D + d) - xh * c) * r);
            }
        }
    }
}

/* ---- y = x * sigmoid(g) ------------------------------------------------------------------------------------------ */

void tl_sigmoid_gate(long n, const float *x, const float *g, float *y) {
#pragma omp parallel for schedule(static) if (n > 40000)
    for (long i = 0; i < n; i += 8) store(y + i, load(x + i) * vsigmoid(load(g + i)));
}

void tl_sigmoid_gate_bwd(long n, const float *x, const float *g, const float *dy, float *dx, float *dg) {
#pragma omp parallel for schedule(static) if (n > 40000)
    for (long i = 0; i < n; i += 8) {
        v8 s = vsigmoid(load(g + i)), d = load(dy + i);
        store(dx + i, d * s);
        store(dg + i, d * load(x + i) * s * (splat(1) - s));
    }
}

/* ---- gated linear units: h = [gate | up] rows of 2F. situ: beta tanh(g/beta) sigmoid(g) * lb tanh(u/lb); else SwiGLU */

void tl_glu(long M, long F, int situ, float beta, float lb, const float *h, float *y) {
#pragma omp parallel for schedule(static) if (M * F > 20000)
    for (long m = 0; m < M; m++)
        for (long f = 0; f < F; f += 8) {
            v8 g = load(h + m * 2 * F + f), u = load(h + m * 2 * F + F + f), s = vsigmoid(g);
            if (situ) {
                g = splat(beta) * vtanh(g / splat(beta));
                u = splat(lb) * vtanh(u / splat(lb));
            }
            store(y + m * F + f, g * s * u);
        }
}

void tl_glu_bwd(long M, long F, int situ, float beta, float lb, const float *h, const float *dy, float *dh) {
#pragma omp parallel for schedule(static) if (M * F > 20000)
    for (long m = 0; m < M; m++)
        for (long f = 0; f < F; f += 8) {
            v8 g = load(h + m * 2 * F + f), u = load(h + m * 2 * F + F + f), d = load(dy + m * F + f), s = vsigmoid(g);
            v8 a = g, da = splat(1), b = u, db = splat(1);
            if (situ) {
                v8 tg = vtanh(g / splat(beta)), tu = vtanh(u / splat(lb));
                a = splat(beta) * tg;
                da = splat(1) - tg * tg;
                b = splat(lb) * tu;
                db = splat(1) - tu * tu;
            }
            store(dh + m * 2 * F + f, d * b * (da * s + a * s * (splat(1) - s)));
            store(dh + m * 2 * F + F + f, d * a * s * db);
        }
}

/* ---- router: s = sigmoid(logits); choose top-k of s + bias; p = s / sum over chosen (K3 Eq. 13) -------------------- */

void tl_router(long M, long E, long k, const float *logits, const float *bias, float scale, int64_t *idx, float *p) {
#pragma omp parallel for schedule(static) if (M * E > 20000)
    for (long m = 0; m < M; m++) {
        float s[E];
        char taken[E];
        memset(taken, 0, E);
        for (long e = 0; e < E; e++) s[e] = sigmoid1(logits[m * E + e]);
        float sum = 0;
        for (long j = 0; j < k; j++) {
            long best = -1;
            for (long e = 0; e < E; e++)
                if (!taken[e] && (best < 0 || s[e] + bias[e] > s[best] + bias[best])) best = e;
            taken[best] = 1;
            idx[m * k + j] = best;
            p[m * k + j] = s[best];
            sum += s[best];
        }
        for (long j = 0; j < k; j++) p[m * k + j] = p[m * k + j] / (sum + 1e-20f) * scale;
    }
}

/* ---- causal depthwise short convolution + SiLU over each sequence -------------------------------------------------
 * pre[t,c] = sum_j w[c,j] x[t-W+1+j, c]; y = silu(pre). Rows before the sequence come from tail[slot][W-1][C] when the
 * sequence continues, else zeros. With a cache the new tail is written back. */

INLINE const float *conv_row(long t, long W, long C, const float *x, const float *tail) {
    return t >= 0 ? x + t * C : tail ? tail + (W - 1 + t) * C : 0;
}

INLINE v8 conv_pre(long t, long c, long W, long C, const float *x, const float *wt, const float *tail) {
    v8 acc = splat(0);
    for (long j = 0; j < W; j++) {
        const float *row = conv_row(t - W + 1 + j, W, C, x, tail);
        if (row) acc += load(wt + j * C + c) * load(row + c);
    }
    return acc;
}

/* wt is [W, C]; tails [slots, W-1, C] or NULL. */
void tl_conv(long S, const int32_t *cu, const int32_t *start, const int32_t *slot, long W, long C, const float *x,
             const float *wt, float *tails, float *y) {
#pragma omp parallel for schedule(dynamic, 1) if ((cu[S] - cu[0]) * C > 20000)
    for (long s = 0; s < S; s++) {
        long T = cu[s + 1] - cu[s];
        const float *xs = x + cu[s] * C;
        float *tail = tails ? tails + slot[s] * (W - 1) * C : 0;
        const float *past = tail && start[s] ? tail : 0;
        for (long t = 0; t < T; t++)
            for (long c = 0; c < C; c += 8) {
                v8 pre = conv_pre(t, c, W, C, xs, wt, past);
                store(y + (cu[s] + t) * C + c, pre * vsigmoid(pre));
            }
        if (tail) {
            float next[(W - 1) * C];
            for (long j = 0; j < W - 1; j++) {
                const float *row = conv_row(T - (W - 1) + j, W, C, xs, past);
                if (row) memcpy(next + j * C, row, C * sizeof(float));
                else memset(next + j * C, 0, C * sizeof(float));
            }
            memcpy(tail, next, sizeof next);
        }
    }
}

/* dw: S partial sums would be large, so BLOCKS row-wise groups of sequences; pre is scratch [N, C]. */
void tl_conv_bwd(long S, const int32_t *cu, long W, long C, const float *x, const float *wt, const float *dy, float *dx,
                 float *dw, float *dpre) {
    long step = (S + BLOCKS - 1) / BLOCKS;
#pragma omp parallel for schedule(dynamic, 1)
    for (long b = 0; b < BLOCKS; b++) {
        float *dwb = dw + b * W * C;
        memset(dwb, 0, W * C * sizeof(float));
        for (long s = b * step; s < (b + 1) * step && s < S; s++) {
            long T = cu[s + 1] - cu[s];
            const float *xs = x + cu[s] * C;
            float *ds = dpre + cu[s] * C;
            for (long t = 0; t < T; t++)
                for (long c = 0; c < C; c += 8) {
                    v8 pre = conv_pre(t, c, W, C, xs, wt, 0), g = vsigmoid(pre);
                    v8 d = load(dy + (cu[s] + t) * C + c) * (g + pre * g * (splat(1) - g));
                    store(ds + t * C + c, d);
                    for (long j = 0; j < W; j++)
                        if (t - W + 1 + j >= 0)
                            store(dwb + j * C + c, load(dwb + j * C + c) + d * load(xs + (t - W + 1 + j) * C + c));
                }
            for (long t = 0; t < T; t++)
                for (long c = 0; c < C; c += 8) {
                    v8 acc = splat(0);
                    for (long j = 0; j < W; j++) {
                        long u = t + W - 1 - j;
                        if (u < T) acc += load(wt + j * C + c) * load(ds + u * C + c);
                    }
                    store(dx + (cu[s] + t) * C + c, acc);
                }
        }
    }
}

/* ---- KDA decay gate: log-decay g of every channel --------------------------------------------------------------------
 * y = z + dt; g = lower sigmoid(exp(A) y) (K3) or, with lower = 0, g = -exp(A) softplus(y) (Kimi Linear). z, g [M, H, D]. */

void tl_kda_gate(long M, long H, long D, const float *z, const float *dt, const float *A_log, float lower, float *g) {
#pragma omp parallel for schedule(static) if (M * H * D > 20000)
    for (long m = 0; m < M; m++)
        for (long h = 0; h < H; h++) {
            v8 ea = vexp(splat(A_log[h]));
            for (long d = 0; d < D; d += 8) {
                v8 y = load(z + (m * H + h) * D + d) + load(dt + h * D + d);
                store(g + (m * H + h) * D + d, lower < 0 ? splat(lower) * vsigmoid(ea * y) : -ea * vsoftplus(y));
            }
        }
}

void tl_kda_gate_bwd(long M, long H, long D, const float *z, const float *dt, const float *A_log, float lower,
                     const float *dg, float *dz) {
#pragma omp parallel for schedule(static) if (M * H * D > 20000)
    for (long m = 0; m < M; m++)
        for (long h = 0; h < H; h++) {
            v8 ea = vexp(splat(A_log[h]));
            for (long d = 0; d < D; d += 8) {
                v8 y = load(z + (m * H + h) * D + d) + load(dt + h * D + d), s = vsigmoid(lower < 0 ? ea * y : y);
                v8 slope = lower < 0 ? splat(lower) * ea * s * (splat(1) - s) : -ea * s;
                store(dz + (m * H + h) * D + d, load(dg + (m * H + h) * D + d) * slope);
            }
        }
}

/* ---- KDA (Kimi Linear Eq. 1): recurrent scan -------------------------------------------------------------------------
 * S_t = (I - b k kT) Diag(exp g) S_{t-1} + b k vT ; o_t = S_tT q ; q,k L2-normed, q scaled by dk^-1/2, b = sigmoid(beta).
 * qkv rows are [3, H, D] (after convolution), g [H, D].
 * marks (or NULL) receives the state every MARK tokens of each sequence, for the backward. */

#define MARK 32
#define MAXD 256

INLINE void kda_inputs(long D, const float *q, const float *k, const float *g, float *qn, float *kn, float *a, float *rq,
                       float *rk) {
    v8 sq = splat(0), sk = splat(0);
    for (long d = 0; d < D; d += 8) {
        sq += load(q + d) * load(q + d);
        sk += load(k + d) * load(k + d);
    }
    *rq = 1.0f / sqrtf(hsum(sq) + 1e-6f);
    *rk = 1.0f / sqrtf(hsum(sk) + 1e-6f);
    float qs = *rq / sqrtf((float)D);
    for (long d = 0; d < D; d += 8) {
        store(qn + d, load(q + d) * splat(qs));
        store(kn + d, load(k + d) * splat(*rk));
        store(a + d, vexp(load(g + d)));
    }
}

/* One token: decay, delta-rule write, read. A receives the decayed state when wanted. */
INLINE void kda_step(const long D, float *st, const float *q, const float *k, const float *a, const float *v, float b,
                     float *u, float *o, float *A) {
    v8 w[MAXD / 8], out[MAXD / 8], uv[MAXD / 8];
    const long n = D / 8;
    for (long c = 0; c < n; c++) w[c] = out[c] = splat(0);
    for (long i = 0; i < D; i++) {
        v8 ai = splat(a[i]), ki = splat(k[i]);
        for (long c = 0; c < n; c++) {
            v8 x = load(st + i * D + 8 * c) * ai;
            store(st + i * D + 8 * c, x);
            w[c] += ki * x;
        }
    }
    if (A) memcpy(A, st, D * D * sizeof(float));
    for (long c = 0; c < n; c++) {
        uv[c] = splat(b) * (load(v + 8 * c) - w[c]);
        store(u + 8 * c, uv[c]);
    }
    for (long i = 0; i < D; i++) {
        v8 qi = splat(q[i]), ki = splat(k[i]);
        for (long c = 0; c < n; c++) {
            v8 x = load(st + i * D + 8 * c) + ki * uv[c];
            store(st + i * D + 8 * c, x);
            out[c] += qi * x;
        }
    }
    if (o)
        for (long c = 0; c < n; c++) store(o + 8 * c, out[c]);
}

static void kda_step_any(long D, float *st, const float *q, const float *k, const float *a, const float *v, float b,
                         float *u, float *o, float *A) {
    if (D == 32) kda_step(32, st, q, k, a, v, b, u, o, A);
    else if (D == 64) kda_step(64, st, q, k, a, v, b, u, o, A);
    else if (D == 128) kda_step(128, st, q, k, a, v, b, u, o, A);
    else kda_step(D, st, q, k, a, v, b, u, o, A);
}

void tl_kda(long S, const int32_t *cu, const int32_t *start, const int32_t *slot, long H, long D, const float *qkv,
            const float *g, const float *beta, float *states, float *o, float *marks, const int32_t *mark_off) {
#pragma omp parallel for schedule(dynamic, 1) collapse(2) if ((cu[S] - cu[0]) * H * D > 2000)
    for (long s = 0; s < S; s++)
        for (long h = 0; h < H; h++) {
            float local[D * D], qn[D], kn[D], a[D], u[D], rq, rk;
            float *st = states ? states + (slot[s] * H + h) * D * D : local;
            if (!states || !start[s]) memset(st, 0, D * D * sizeof(float));
            for (long n = cu[s]; n < cu[s + 1]; n++) {
                long t = n - cu[s];
                if (marks && t % MARK == 0)
                    memcpy(marks + ((mark_off[s] + t / MARK) * H + h) * D * D, st, D * D * sizeof(float));
                const float *q = qkv + n * 3 * H * D + h * D, *k = q + H * D, *v = k + H * D;
                kda_inputs(D, q, k, g + (n * H + h) * D, qn, kn, a, &rq, &rk);
                kda_step_any(D, st, qn, kn, a, v, sigmoid1(beta[n * H + h]), u, o + (n * H + h) * D, 0);
            }
        }
}

/* x = y_raw * r with r = rsqrt(|y_raw|^2 + eps): gradient of the raw vector from dx (already times any scale). */
INLINE void l2norm_bwd(long D, const float *raw, float r, const float *d, float *out) {
    v8 dot = splat(0);
    for (long i = 0; i < D; i += 8) dot += load(d + i) * load(raw + i);
    float c = hsum(dot) * r * r;
    for (long i = 0; i < D; i += 8) store(out + i, (load(d + i) - load(raw + i) * splat(c)) * splat(r));
}

INLINE void kda_step_bwd(const long D, float *dS, const float *A, const float *q, const float *k, const float *a,
                         const float *u, float b, const float *v, const float *do_, float *dq, float *dk, float *dg,
                         float *dv, float *db) {
    const long n = D / 8;
    v8 du[MAXD / 8], dov[MAXD / 8], uv[MAXD / 8], dw[MAXD / 8], udo = splat(0);
    for (long c = 0; c < n; c++) {
        du[c] = splat(0);
        dov[c] = load(do_ + 8 * c);
        uv[c] = load(u + 8 * c);
        udo += dov[c] * uv[c];
    }
    float ud = hsum(udo);
    for (long i = 0; i < D; i++) {
        v8 qi = splat(q[i]), ki = splat(k[i]), sq = splat(0), sk = splat(0);
        for (long c = 0; c < n; c++) {
            v8 x = load(dS + i * D + 8 * c) + qi * dov[c];
            store(dS + i * D + 8 * c, x);
            du[c] += ki * x;
            sk += x * uv[c];
            sq += load(A + i * D + 8 * c) * dov[c];
        }
        dq[i] = hsum(sq) + k[i] * ud;
        dk[i] = hsum(sk);
    }
    v8 sb = splat(0);
    for (long c = 0; c < n; c++) {
        sb += du[c] * uv[c];
        v8 d = splat(b) * du[c];
        store(dv + 8 * c, d);
        dw[c] = -d;
    }
    *db = hsum(sb) / b;
    for (long i = 0; i < D; i++) {
        v8 ki = splat(k[i]), ai = splat(a[i]), sk = splat(0), sg = splat(0);
        for (long c = 0; c < n; c++) {
            v8 Ai = load(A + i * D + 8 * c), x = load(dS + i * D + 8 * c) + ki * dw[c];
            sk += Ai * dw[c];
            sg += Ai * x;
            store(dS + i * D + 8 * c, x * ai);
        }
        dk[i] += hsum(sk);
        dg[i] = hsum(sg);
    }
}

void tl_kda_bwd(long S, const int32_t *cu, long H, long D, const float *qkv, const float *g, const float *beta,
                const float *marks, const int32_t *mark_off, const float *do_, float *dqkv, float *dg, float *dbeta) {
#pragma omp parallel
    {
        float *A = malloc(sizeof(float) * MARK * D * D), *aux = malloc(sizeof(float) * MARK * D * 4);
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (long s = 0; s < S; s++)
            for (long h = 0; h < H; h++) {
                float st[D * D], dS[D * D], tmp[D], dq[D], dk[D], rq[MARK], rk[MARK], bs[MARK];
                float qscale = 1.0f / sqrtf((float)D);
                long T = cu[s + 1] - cu[s];
                memset(dS, 0, sizeof dS);
                for (long m = (T - 1) / MARK; T && m >= 0; m--) {
                    long t0 = m * MARK, len = T - t0 < MARK ? T - t0 : MARK;
                    memcpy(st, marks + ((mark_off[s] + m) * H + h) * D * D, sizeof st);
                    for (long t = 0; t < len; t++) {
                        long n = cu[s] + t0 + t;
                        const float *q = qkv + n * 3 * H * D + h * D, *k = q + H * D, *v = k + H * D;
                        float *qn = aux + t * 4 * D, *kn = qn + D, *a = kn + D, *u = a + D;
                        kda_inputs(D, q, k, g + (n * H + h) * D, qn, kn, a, rq + t, rk + t);
                        bs[t] = sigmoid1(beta[n * H + h]);
                        kda_step_any(D, st, qn, kn, a, v, bs[t], u, 0, A + t * D * D);
                    }
                    for (long t = len - 1; t >= 0; t--) {
                        long n = cu[s] + t0 + t;
                        const float *q = qkv + n * 3 * H * D + h * D, *k = q + H * D, *v = k + H * D;
                        float *dqr = dqkv + n * 3 * H * D + h * D, *dkr = dqr + H * D, *dvr = dkr + H * D, *dgr = dg + (n * H + h) * D, db;
                        const float *qn = aux + t * 4 * D, *kn = qn + D, *a = kn + D, *u = a + D;
                        const float *dor = do_ + (n * H + h) * D;
                        if (D == 32)
                            kda_step_bwd(32, dS, A + t * D * D, qn, kn, a, u, bs[t], v, dor, dq, dk, dgr, dvr, &db);
                        else
                            kda_step_bwd(D, dS, A + t * D * D, qn, kn, a, u, bs[t], v, dor, dq, dk, dgr, dvr, &db);
                        for (long d = 0; d < D; d++) tmp[d] = dq[d] * qscale;
                        l2norm_bwd(D, q, rq[t], tmp, dqr);
                        l2norm_bwd(D, k, rk[t], dk, dkr);
                        dbeta[n * H + h] = db * bs[t] * (1.0f - bs[t]);
                    }
                }
            }
        free(A);
        free(aux);
    }
}

/* ---- MLA in absorbed form: every head reads one shared row per token, [latent (R) | rope key (D - R)] ----------------
 * q [N, H, D] already scaled; out[n, h, :R] = sum_j softmax_j(q . row_j) row_j[:R], j <= position of n. */

typedef struct {
    const float *rows;        /* new rows [N, D] (training) */
    const float *pages;       /* [pages, P, D] or NULL */
    const int32_t *table;     /* [S, maxp] */
    long P, maxp;
} Keys;

/* Gather keys 0..T of sequence s into rows [Tp, D] and transposed [D, Tp], zero padded. */
static void gather_keys(const Keys *kv, long s, long base, long T, long Tp, long D, float *rows, float *cols) {
    for (long j = 0; j < T; j++) {
        const float *r = kv->pages ? kv->pages + (kv->table[s * kv->maxp + j / kv->P] * kv->P + j % kv->P) * D
                                   : kv->rows + (base + j) * D;
        memcpy(rows + j * D, r, D * sizeof(float));
        for (long d = 0; d < D; d++) cols[d * Tp + j] = r[d];
    }
    for (long j = T; j < Tp; j++) {
        memset(rows + j * D, 0, D * sizeof(float));
        for (long d = 0; d < D; d++) cols[d * Tp + j] = 0;
    }
}

/* Probabilities of query rows i0..i0+n (row = token * H + head) over keys 0..Tp; masked entries are exactly 0. */
INLINE float softmax_row(float *p, long last, long Tp, float *lse) {
    float mx = p[0];
    for (long j = 1; j <= last; j++) mx = p[j] > mx ? p[j] : mx;
    for (long j = last + 1; j < Tp; j++) p[j] = mx - 200.0f;
    v8 sum = splat(0);
    for (long j = 0; j < Tp; j += 8) {
        v8 e = vexp(load(p + j) - splat(mx));
        store(p + j, e);
        if (j + 8 > last + 1)
            for (long i = 0; i < 8; i++)
                if (j + i > last) p[j + i] = 0;
        sum += load(p + j);
    }
    float total = hsum(sum);
    v8 inv = splat(1.0f / total);
    for (long j = 0; j < Tp; j += 8) store(p + j, load(p + j) * inv);
    *lse = mx + logf(total);
    return mx;
}

#define QT 48 /* query rows per tile */

/* max_logit [S, H] (or NULL) receives the largest score per head, for QK-Clip. */
void tl_mla(long S, const int32_t *cu, const int32_t *start, long H, long D, long R, const float *q, const float *rows,
            const float *pages, const int32_t *table, long P, long maxp, float *out, float *max_logit) {
    Keys kv = {rows, pages, table, P, maxp};
#pragma omp parallel
    {
        float *buf = 0;
        long cap = 0;
#pragma omp for schedule(dynamic, 1)
        for (long s = 0; s < S; s++) {
            long L = cu[s + 1] - cu[s], T = start[s] + L, Tp = (T + 15) / 16 * 16;
            long need = Tp * (2 * D + QT);
            if (need > cap) {
                free(buf);
                buf = aligned_alloc(64, (cap = need) * sizeof(float) / 64 * 64 + 64);
            }
            float *kr = buf, *kc = kr + Tp * D, *sc = kc + Tp * D, lse;
            gather_keys(&kv, s, cu[s], T, Tp, D, kr, kc);
            if (max_logit)
                for (long h = 0; h < H; h++) max_logit[s * H + h] = -INFINITY;
            for (long i0 = 0; i0 < L * H; i0 += QT) {
                long n = L * H - i0 < QT ? L * H - i0 : QT;
                long Tq = (start[s] + (i0 + n - 1) / H + 16) / 16 * 16;
                gemm(n, Tq, D, q + (cu[s] * H + i0) * D, D, 1, kc, Tp, sc, Tq, 0);
                for (long i = 0; i < n; i++) {
                    float mx = softmax_row(sc + i * Tq, start[s] + (i0 + i) / H, Tq, &lse);
                    if (max_logit && mx > max_logit[s * H + (i0 + i) % H]) max_logit[s * H + (i0 + i) % H] = mx;
                }
                gemm(n, R, Tq, sc, Tq, 1, kr, D, out + (cu[s] * H + i0) * R, R, 0);
            }
        }
        free(buf);
    }
}

void tl_mla_bwd(long S, const int32_t *cu, long H, long D, long R, const float *q, const float *rows, const float *out,
                const float *dout, float *dq, float *drows) {
    Keys kv = {rows, 0, 0, 0, 0};
#pragma omp parallel
    {
        float *buf = 0;
        long cap = 0;
#pragma omp for schedule(dynamic, 1)
        for (long s = 0; s < S; s++) {
            long L = cu[s + 1] - cu[s], Tp = (L + 15) / 16 * 16;
            long need = Tp * (3 * D + 2 * QT);
            if (need > cap) {
                free(buf);
                buf = aligned_alloc(64, (cap = need) * sizeof(float) / 64 * 64 + 64);
            }
            float *kr = buf, *kc = kr + Tp * D, *dk = kc + Tp * D, *sc = dk + Tp * D, *dp = sc + QT * Tp, lse;
            gather_keys(&kv, s, cu[s], L, Tp, D, kr, kc);
            memset(dk, 0, Tp * D * sizeof(float));
            for (long i0 = 0; i0 < L * H; i0 += QT) {
                long n = L * H - i0 < QT ? L * H - i0 : QT, Tq = ((i0 + n - 1) / H + 16) / 16 * 16;
                const float *qi = q + (cu[s] * H + i0) * D, *doi = dout + (cu[s] * H + i0) * R;
                gemm(n, Tq, D, qi, D, 1, kc, Tp, sc, Tq, 0);
                gemm(n, Tq, R, doi, R, 1, kc, Tp, dp, Tq, 0);
                for (long i = 0; i < n; i++) {
                    softmax_row(sc + i * Tq, (i0 + i) / H, Tq, &lse);
                    const float *oi = out + (cu[s] * H + i0 + i) * R;
                    v8 dot = splat(0);
                    for (long r = 0; r < R; r += 8) dot += load(oi + r) * load(doi + i * R + r);
                    v8 delta = splat(hsum(dot));
                    for (long j = 0; j < Tq; j += 8)
                        store(dp + i * Tq + j, load(sc + i * Tq + j) * (load(dp + i * Tq + j) - delta));
                }
                gemm(n, D, Tq, dp, Tq, 1, kr, D, dq + (cu[s] * H + i0) * D, D, 0);
                gemm(Tq, D, n, dp, 1, Tq, qi, D, dk, D, 1);
                gemm(Tq, R, n, sc, 1, Tq, doi, R, dk, D, 1);
            }
            memcpy(drows + cu[s] * D, dk, L * D * sizeof(float));
        }
        free(buf);
    }
}

/* ---- Attention Residuals (K3 Eq. 8-10): h = sum_i softmax_i(w . RMSNorm(v_i)) v_i over J sources ---------------------- */

void tl_attnres(long M, long D, long J, const float *const *v, const float *w, float eps, float *h, float *p, float *rstd) {
#pragma omp parallel for schedule(static) if (M * D > 10000)
    for (long m = 0; m < M; m++) {
        float logit[J], mx = -INFINITY, sum = 0;
        for (long j = 0; j < J; j++) {
            v8 sq = splat(0), dot = splat(0);
            for (long d = 0; d < D; d += 8) {
                v8 x = load(v[j] + m * D + d);
                sq += x * x;
                dot += x * load(w + d);
            }
            float r = 1.0f / sqrtf(hsum(sq) / D + eps);
            rstd[m * J + j] = r;
            logit[j] = hsum(dot) * r;
            mx = logit[j] > mx ? logit[j] : mx;
        }
        for (long j = 0; j < J; j++) sum += logit[j] = vexp(splat(logit[j] - mx))[0];
        for (long j = 0; j < J; j++) p[m * J + j] = logit[j] / sum;
        for (long d = 0; d < D; d += 8) {
            v8 acc = splat(0);
            for (long j = 0; j < J; j++) acc += splat(p[m * J + j]) * load(v[j] + m * D + d);
            store(h + m * D + d, acc);
        }
    }
}

void tl_attnres_bwd(long M, long D, long J, const float *const *v, const float *w, const float *p, const float *rstd,
                    const float *dh, float *const *dv, float *dw) {
    long step = (M + BLOCKS - 1) / BLOCKS;
#pragma omp parallel for schedule(static) if (M * D > 10000)
    for (long b = 0; b < BLOCKS; b++) {
        float *dwb = dw + b * D;
        memset(dwb, 0, D * sizeof(float));
        for (long m = b * step; m < (b + 1) * step && m < M; m++) {
            float dp[J], xw[J], mean = 0;
            const float *g = dh + m * D;
            for (long j = 0; j < J; j++) {
                v8 a = splat(0), c = splat(0);
                for (long d = 0; d < D; d += 8) {
                    v8 x = load(v[j] + m * D + d);
                    a += x * load(g + d);
                    c += x * load(w + d);
                }
                dp[j] = hsum(a);
                xw[j] = hsum(c);
                mean += p[m * J + j] * dp[j];
            }
            for (long j = 0; j < J; j++) {
                float pj = p[m * J + j], r = rstd[m * J + j], dl = pj * (dp[j] - mean);
                v8 cw = splat(dl * r), cx = splat(-dl * xw[j] * r * r * r / D);
                for (long d = 0; d < D; d += 8) {
                    v8 x = load(v[j] + m * D + d);
                    store(dv[j] + m * D + d, splat(pj) * load(g + d) + cw * load(w + d) + cx * x);
                    store(dwb + d, load(dwb + d) + cw * x);
                }
            }
        }
    }
}

/* ---- expert dispatch and combine --------------------------------------------------------------------------------------- */

/* Stable counting sort of n = M * k expert choices: where[i] = row of choice i among the sorted rows, off[E + 1]. */
void tl_dispatch(long n, long E, const int64_t *idx, int64_t *where, int64_t *off) {
    int64_t next[E];
    memset(off, 0, (E + 1) * sizeof(int64_t));
    for (long i = 0; i < n; i++) off[idx[i] + 1]++;
    for (long e = 0; e < E; e++) off[e + 1] += off[e];
    memcpy(next, off, sizeof next);
    for (long i = 0; i < n; i++) where[i] = next[idx[i]]++;
}

/* xs[where[m * k + j]] = x[m] (times p[m, j] when given) */
void tl_scatter(long M, long k, long D, const float *x, const int64_t *where, const float *p, float *xs) {
#pragma omp parallel for schedule(static) if (M * k * D > 40000)
    for (long m = 0; m < M; m++)
        for (long j = 0; j < k; j++) {
            float *to = xs + where[m * k + j] * D;
            v8 c = splat(p ? p[m * k + j] : 1.0f);
            for (long d = 0; d < D; d += 8) store(to + d, load(x + m * D + d) * c);
        }
}

/* y[m] = sum_j p[m, j] xs[where[m * k + j]], j ascending (p NULL = 1) */
void tl_combine(long M, long k, long D, const float *xs, const int64_t *where, const float *p, float *y) {
#pragma omp parallel for schedule(static) if (M * k * D > 40000)
    for (long m = 0; m < M; m++)
        for (long d = 0; d < D; d += 8) {
            v8 acc = splat(0);
            for (long j = 0; j < k; j++)
                acc += load(xs + where[m * k + j] * D + d) * splat(p ? p[m * k + j] : 1.0f);
            store(y + m * D + d, acc);
        }
}

/* dp[m, j] = dy[m] . xs[where[m * k + j]] */
void tl_combine_dp(long M, long k, long D, const float *xs, const int64_t *where, const float *dy, float *dp) {
#pragma omp parallel for schedule(static) if (M * k * D > 40000)
    for (long m = 0; m < M; m++)
        for (long j = 0; j < k; j++) {
            v8 acc = splat(0);
            for (long d = 0; d < D; d += 8) acc += load(xs + where[m * k + j] * D + d) * load(dy + m * D + d);
            dp[m * k + j] = hsum(acc);
        }
}
