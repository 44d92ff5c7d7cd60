/* Multi-head latent attention in absorbed form, over packed rows (training) or cached pages. */
#include "common.h"
#include <omp.h>
#include "team.h"

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

/* Key row j of sequence s, and how many rows follow in one piece. */
INLINE const float *key_at(const Keys *kv, long s, long base, long j, long D, long *run) {
    if (!kv->pages) {
        *run = 1L << 40;
        return kv->rows + (base + j) * D;
    }
    *run = kv->P - j % kv->P;
    return kv->pages + (kv->table[s * kv->maxp + j / kv->P] * kv->P + j % kv->P) * D;
}

/* J keys against N vectors of query rows: a lane is a row, so keys are read as they lie and only q is transposed.
 * st[j, lane] = sum_d key_j[d] qt[d, lane], d ascending. */
INLINE void scores_of(const int J, const int N, long D, const float *key, const float *qt, long Q, float *st) {
    vw acc[8][3];
    for (int j = 0; j < J; j++)
        for (int i = 0; i < N; i++) acc[j][i] = splatw(0);
    for (long d = 0; d < D; d++) {
        vw q[3];
        for (int i = 0; i < N; i++) q[i] = loadw(qt + d * Q + i * VW);
        for (int j = 0; j < J; j++) {
            vw k = splatw(key[j * D + d]);
            for (int i = 0; i < N; i++) acc[j][i] = fmaw(k, q[i], acc[j][i]);
        }
    }
    for (int j = 0; j < J; j++)
        for (int i = 0; i < N; i++) storew(st + j * Q + i * VW, acc[j][i]);
}
#define SCORES(N, J)                                                                                                   \
    static void scores_##N(long n, long D, const float *key, const float *qt, long Q, float *st) {                     \
        long j = 0;                                                                                                    \
        for (; j + J <= n; j += J) scores_of(J, N, D, key + j * D, qt, Q, st + j * Q);                                 \
        for (; j < n; j++) scores_of(1, N, D, key + j * D, qt, Q, st + j * Q);                                         \
    }
#if VW == 16
SCORES(1, 8) SCORES(2, 8) SCORES(3, 8)
#else
SCORES(1, 8) SCORES(2, 4) SCORES(3, 4)
#endif

/* Softmax down the columns of st [T, Q] in place, a vector of rows at a time; row i sees keys 0..last[i]. The sums run in
 * the order of softmax_row. top receives the largest scores. */
static void softmax_columns(long T, long Q, const int32_t *last, float *st, float *top) {
    for (long i = 0; i < Q; i += VW) {
        iw end = *(const iw *)(last + i);
        vw mx = loadw(st + i), sum[8];
        for (long j = 1; j < T; j++) {
            vw x = loadw(st + j * Q + i);
            mx = pickw(((int32_t)j <= end) & (x > mx), x, mx);
        }
        for (int c = 0; c < 8; c++) sum[c] = splatw(0);
        for (long j = 0; j < T; j += 8)
            for (int c = 0; c < 8 && j + c < T; c++) {
                float *at = st + (j + c) * Q + i;
                vw e = pickw((int32_t)(j + c) <= end, vexpw(loadw(at) - mx), splatw(0));
                storew(at, e);
                sum[c] += e;
            }
        vw total = ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
        vw inv = splatw(1.0f) / total;
        for (long j = 0; j < T; j++) storew(st + j * Q + i, loadw(st + j * Q + i) * inv);
        storew(top + i, mx);
    }
}

/* out[i, c..] += sum of st[j, i] key_j[c..] over keys from..upto, for N query rows and one strip of columns, j ascending.
 * The sum begins at 0 with key 0. */
#define WEIGH(name, vector, lanes, read, write, fill, fused)                                                           \
    INLINE void name##_of(const int N, const Keys *kv, long s, long base, long from, long upto, long D, long Q,        \
                          const float *st, long c, float *out, long R) {                                               \
        vector a[12], b[12];                                                                                           \
        for (int i = 0; i < N; i++) {                                                                                  \
            a[i] = from ? read(out + i * R + c) : fill(0);                                                             \
            b[i] = from ? read(out + i * R + c + lanes) : fill(0);                                                     \
        }                                                                                                              \
        for (long j = from, run; j < upto; j += run) {                                                                 \
            const float *key = key_at(kv, s, base, j, D, &run) + c;                                                    \
            run = MIN(run, upto - j);                                                                                  \
            for (long t = 0; t < run; t++) {                                                                           \
                vector x = read(key + t * D), y = read(key + t * D + lanes);                                           \
                for (int i = 0; i < N; i++) {                                                                          \
                    vector p = fill(st[(j + t) * Q + i]);                                                              \
                    a[i] = fused(p, x, a[i]);                                                                          \
                    b[i] = fused(p, y, b[i]);                                                                          \
                }                                                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        for (int i = 0; i < N; i++) {                                                                                  \
            write(out + i * R + c, a[i]);                                                                              \
            write(out + i * R + c + lanes, b[i]);                                                                      \
        }                                                                                                              \
    }                                                                                                                  \
    static void name(long n, const Keys *kv, long s, long base, long from, long upto, long D, long Q, const float *st, \
                     long c, float *out, long R) {                                                                     \
        long i = 0;                                                                                                    \
        if (lanes == 16 && n % 12 != 4) /* 16 rows are 8 + 8 */                                                        \
            for (; i + 12 <= n; i += 12) name##_of(12, kv, s, base, from, upto, D, Q, st + i, c, out + i * R, R);      \
        for (; i + WIDE <= n; i += WIDE) name##_of(WIDE, kv, s, base, from, upto, D, Q, st + i, c, out + i * R, R);    \
        for (; i + 4 <= n; i += 4) name##_of(4, kv, s, base, from, upto, D, Q, st + i, c, out + i * R, R);             \
        for (; i < n; i++) name##_of(1, kv, s, base, from, upto, D, Q, st + i, c, out + i * R, R);                     \
    }
#if VW > 8
#define WIDE 8
WEIGH(weigh_w, vw, VW, loadw, storew, splatw, fmaw)
#undef WIDE
#endif
#define WIDE 6
typedef float v4 __attribute__((vector_size(16), aligned(4)));
INLINE v4 load4(const float *p) { return *(const v4 *)p; }
INLINE void store4(float *p, v4 x) { *(v4 *)p = x; }
INLINE v4 splat4(float x) { return (v4){x, x, x, x}; }
INLINE v4 fma4(v4 a, v4 b, v4 c) {
    for (int i = 0; i < 4; i++) c[i] = fmaf(a[i], b[i], c[i]);
    return c;
}
WEIGH(weigh_8, v8, 8, load, store, splat, fma8)
WEIGH(weigh_4, v4, 4, load4, store4, splat4, fma4)

#define NEAR 128 /* keys whose strip of columns, and whose weights, lie in the first cache for all rows of a tile */

/* Query rows i0..i0+n of sequence s (row = token * H + head): scores, softmax, weighted sum. */
static void attend(const Keys *kv, long s, long base, long start, long H, long D, long R, long i0, long n, const float *q,
                   float *out, float *top) {
    const long Q = (n + VW - 1) / VW * VW, T = start + (i0 + n - 1) / H + 1;
    float *qt = tl_scratch(Q * (D + T)), *st = qt + D * Q;
    int32_t last[QT];
    for (long i = 0; i < Q; i++) last[i] = start + (i0 + MIN(i, n - 1)) / H;
    for (long d = 0; d < D; d++)
        for (long i = 0; i < Q; i++) qt[d * Q + i] = i < n ? q[i * D + d] : 0;
    for (long j = 0, run; j < T; j += run) {
        const float *key = key_at(kv, s, base, j, D, &run);
        run = MIN(run, T - j);
        for (long i = 0; i < Q;) {
            long left = (Q - i) / VW;
            (left >= 3 ? scores_3 : left == 2 ? scores_2 : scores_1)(run, D, key, qt + i, Q, st + j * Q + i);
            i += MIN(left, 3) * VW;
        }
    }
    softmax_columns(T, Q, last, st, top);
    for (long j = 0; j < T; j += NEAR) {
        const long end = MIN(j + NEAR, T);
        long c = 0;
#if VW > 8
        for (; c + 2 * VW <= R; c += 2 * VW) weigh_w(n, kv, s, base, j, end, D, Q, st, c, out, R);
#endif
        for (; c + 16 <= R; c += 16) weigh_8(n, kv, s, base, j, end, D, Q, st, c, out, R);
        for (; c < R; c += 8) weigh_4(n, kv, s, base, j, end, D, Q, st, c, out, R);
    }
}

typedef struct {
    const Keys *kv;
    long S, H, D, R, tile;
    const long *first; /* tile of each sequence */
    const int32_t *cu, *start;
    const float *q;
    float *out, *top;
} Attention;

static void one_tile(const void *of, long t) {
    const Attention *a = of;
    const int32_t *cu = a->cu;
    long lo = 0, hi = a->S;
    while (hi - lo > 1) a->first[(lo + hi) / 2] <= t ? (lo = (lo + hi) / 2) : (hi = (lo + hi) / 2);
    long i0 = (t - a->first[lo]) * a->tile, n = MIN(a->tile, (cu[lo + 1] - cu[lo]) * a->H - i0), row = cu[lo] * a->H + i0;
    float mx[QT];
    attend(a->kv, lo, cu[lo], a->start[lo], a->H, a->D, a->R, i0, n, a->q + row * a->D, a->out + row * a->R, mx);
    if (a->top) memcpy(a->top + row - cu[0] * a->H, mx, n * sizeof(float));
}

/* max_logit [S, H] (or NULL) receives the largest score per head, for QK-Clip. */
void tl_mla(long S, const int32_t *cu, const int32_t *start, long H, long D, long R, const float *q, const float *rows,
            const float *pages, const int32_t *table, long P, long maxp, float *out, float *max_logit) {
    Keys kv = {rows, pages, table, P, maxp};
    long first[S + 1], work = 0, tile = QT;
    for (int again = 0; again < 2; again++) {
        first[0] = 0;
        for (long s = 0; s < S; s++) first[s + 1] = first[s] + ((cu[s + 1] - cu[s]) * H + tile - 1) / tile;
        if (first[S] >= omp_get_max_threads()) break;
        tile = 8; /* too few tiles for the threads: smaller ones */
    }
    for (long s = 0; s < S; s++) work += (cu[s + 1] - cu[s]) * H * D * (start[s] + (cu[s + 1] - cu[s]));
    float *top = max_logit ? malloc(sizeof(float) * ((size_t)cu[S] - cu[0] + 1) * H) : 0;
    Attention all = {&kv, S, H, D, R, tile, first, cu, start, q, out, top};
    if (work > WORTH_SHARING) tl_share(first[S], one_tile, &all);
    else
        for (long t = 0; t < first[S]; t++) one_tile(&all, t);
    if (!top) return;
    for (long s = 0; s < S; s++)
        for (long h = 0; h < H; h++) {
            float mx = -INFINITY;
            for (long m = cu[s]; m < cu[s + 1]; m++) {
                float x = top[(m - cu[0]) * H + h];
                mx = x > mx ? x : mx;
            }
            max_logit[s * H + h] = mx;
        }
    free(top);
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
