/* Multi-head latent attention in absorbed form, over packed rows (training) or cached pages. */
#include "common.h"

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
                tl_gemm(n, Tq, D, q + (cu[s] * H + i0) * D, D, 1, kc, Tp, sc, Tq, 0);
                for (long i = 0; i < n; i++) {
                    float mx = softmax_row(sc + i * Tq, start[s] + (i0 + i) / H, Tq, &lse);
                    if (max_logit && mx > max_logit[s * H + (i0 + i) % H]) max_logit[s * H + (i0 + i) % H] = mx;
                }
                tl_gemm(n, R, Tq, sc, Tq, 1, kr, D, out + (cu[s] * H + i0) * R, R, 0);
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
                tl_gemm(n, Tq, D, qi, D, 1, kc, Tp, sc, Tq, 0);
                tl_gemm(n, Tq, R, doi, R, 1, kc, Tp, dp, Tq, 0);
                for (long i = 0; i < n; i++) {
                    softmax_row(sc + i * Tq, (i0 + i) / H, Tq, &lse);
                    const float *oi = out + (cu[s] * H + i0 + i) * R;
                    v8 dot = splat(0);
                    for (long r = 0; r < R; r += 8) dot += load(oi + r) * load(doi + i * R + r);
                    v8 delta = splat(hsum(dot));
                    for (long j = 0; j < Tq; j += 8)
                        store(dp + i * Tq + j, load(sc + i * Tq + j) * (load(dp + i * Tq + j) - delta));
                }
                tl_gemm(n, D, Tq, dp, Tq, 1, kr, D, dq + (cu[s] * H + i0) * D, D, 0);
                tl_gemm(Tq, D, n, dp, 1, Tq, qi, D, dk, D, 1);
                tl_gemm(Tq, R, n, sc, 1, Tq, doi, R, dk, D, 1);
            }
            memcpy(drows + cu[s] * D, dk, L * D * sizeof(float));
        }
        free(buf);
    }
}
