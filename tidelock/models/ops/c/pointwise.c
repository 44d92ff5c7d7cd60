/* What works row by row or number by number: norms, gates, gated units, the mixing of Attention Residuals. */
#include "common.h"

/* ---- RMSNorm, optionally times sigmoid(gate): y = x / rms(x) * w [* sigmoid(g)] ---------------------------------- */

/* Rows of x are xs apart, rows of y ys; gate rows lie one after the other. rstd [M] (or NULL) is kept for the backward. */
void tl_rmsnorm(long M, long D, const float *x, long xs, const float *w, const float *gate, float eps, float *y, long ys,
                float *rstd) {
#pragma omp parallel for schedule(static) if (M * D > 20000)
    for (long m = 0; m < M; m++) {
        const float *xr = x + m * xs;
        v8 s = splat(0);
        for (long d = 0; d < D; d += 8) s += load(xr + d) * load(xr + d);
        float r = 1.0f / sqrtf(hsum(s) / D + eps);
        if (rstd) rstd[m] = r;
        for (long d = 0; d < D; d += 8) {
            v8 v = load(xr + d) * splat(r) * load(w + d);
            if (gate) v = v * vsigmoid(load(gate + m * D + d));
            store(y + m * ys + d, v);
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
                store(dwb + d, fma8(g, xh, load(dwb + d)));
                g = g * wv;
                dot = fma8(g, xh, dot);
                store(dx + m * D + d, g);
            }
            v8 c = splat(hsum(dot) / D);
            for (long d = 0; d < D; d += 8) {
                v8 xh = load(xr + d) * r;
                store(dx + m * D + d, fma8(-xh, c, load(dx + m * D + d)) * r);
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
                da = fma8(-tg, tg, splat(1));
                b = splat(lb) * tu;
                db = fma8(-tu, tu, splat(1));
            }
            store(dh + m * 2 * F + f, d * b * fma8(a * s, splat(1) - s, da * s));
            store(dh + m * 2 * F + F + f, d * a * s * db);
        }
}

/* ---- Attention Residuals (K3 Eq. 8-10): h = sum_i softmax_i(w . RMSNorm(v_i)) v_i over J sources ---------------------
 * p and rstd [M, J] (or NULL) are kept for the backward. */

void tl_attnres(long M, long D, long J, const float *const *v, const float *w, float eps, float *h, float *p, float *rstd) {
#pragma omp parallel for schedule(static) if (M * D > 10000)
    for (long m = 0; m < M; m++) {
        float logit[J], mx = -INFINITY, sum = 0;
        for (long j = 0; j < J; j++) {
            v8 sq = splat(0), dot = splat(0);
            for (long d = 0; d < D; d += 8) {
                v8 x = load(v[j] + m * D + d);
                sq = fma8(x, x, sq);
                dot = fma8(x, load(w + d), dot);
            }
            float r = 1.0f / sqrtf(hsum(sq) / D + eps);
            if (rstd) rstd[m * J + j] = r;
            logit[j] = hsum(dot) * r;
            mx = logit[j] > mx ? logit[j] : mx;
        }
        for (long j = 0; j < J; j++) sum += logit[j] = vexp(splat(logit[j] - mx))[0];
        for (long j = 0; j < J; j++) {
            logit[j] = logit[j] / sum;
            if (p) p[m * J + j] = logit[j];
        }
        for (long d = 0; d < D; d += 8) {
            v8 acc = splat(0);
            for (long j = 0; j < J; j++) acc += splat(logit[j]) * load(v[j] + m * D + d);
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
                    a = fma8(x, load(g + d), a);
                    c = fma8(x, load(w + d), c);
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
                    store(dv[j] + m * D + d, fma8(cx, x, fma8(splat(pj), load(g + d), cw * load(w + d))));
                    store(dwb + d, fma8(cw, x, load(dwb + d)));
                }
            }
        }
    }
}
