/* Kimi Delta Attention: short convolution, decay gate, recurrence, and their gradients. */
#include "common.h"

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
        if (row) acc = fma8(load(wt + j * C + c), load(row + c), acc);
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
                    v8 d = load(dy + (cu[s] + t) * C + c) * fma8(pre * g, splat(1) - g, g);
                    store(ds + t * C + c, d);
                    for (long j = 0; j < W; j++)
                        if (t - W + 1 + j >= 0)
                            store(dwb + j * C + c, fma8(d, load(xs + (t - W + 1 + j) * C + c), load(dwb + j * C + c)));
                }
            for (long t = 0; t < T; t++)
                for (long c = 0; c < C; c += 8) {
                    v8 acc = splat(0);
                    for (long j = 0; j < W; j++) {
                        long u = t + W - 1 - j;
                        if (u < T) acc = fma8(load(wt + j * C + c), load(ds + u * C + c), acc);
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
        sq = fma8(load(q + d), load(q + d), sq);
        sk = fma8(load(k + d), load(k + d), sk);
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
            w[c] = fma8(ki, x, w[c]);
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
            v8 x = fma8(ki, uv[c], load(st + i * D + 8 * c));
            store(st + i * D + 8 * c, x);
            out[c] = fma8(qi, x, out[c]);
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
    for (long i = 0; i < D; i += 8) store(out + i, fma8(-load(raw + i), splat(c), load(d + i)) * splat(r));
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
        udo = fma8(dov[c], uv[c], udo);
    }
    float ud = hsum(udo);
    for (long i = 0; i < D; i++) {
        v8 qi = splat(q[i]), ki = splat(k[i]), sq = splat(0), sk = splat(0);
        for (long c = 0; c < n; c++) {
            v8 x = fma8(qi, dov[c], load(dS + i * D + 8 * c));
            store(dS + i * D + 8 * c, x);
            du[c] = fma8(ki, x, du[c]);
            sk = fma8(x, uv[c], sk);
            sq = fma8(load(A + i * D + 8 * c), dov[c], sq);
        }
        dq[i] = fmaf(k[i], ud, hsum(sq));
        dk[i] = hsum(sk);
    }
    v8 sb = splat(0);
    for (long c = 0; c < n; c++) {
        sb = fma8(du[c], uv[c], sb);
        v8 d = splat(b) * du[c];
        store(dv + 8 * c, d);
        dw[c] = -d;
    }
    *db = hsum(sb) / b;
    for (long i = 0; i < D; i++) {
        v8 ki = splat(k[i]), ai = splat(a[i]), sk = splat(0), sg = splat(0);
        for (long c = 0; c < n; c++) {
            v8 Ai = load(A + i * D + 8 * c), x = fma8(ki, dw[c], load(dS + i * D + 8 * c));
            sk = fma8(Ai, dw[c], sk);
            sg = fma8(Ai, x, sg);
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
