/* Mixture of experts: the router, and rows to their experts and back. */
#include "common.h"

/* ---- router: s = sigmoid(logits); choose top-k of s + bias; p = s / sum over chosen (K3 Eq. 13) -------------------- */

void tl_router(long M, long E, long k, const float *logits, const float *bias, float scale, int64_t *idx, float *p) {
#pragma omp parallel for schedule(static) if (M * E > 20000)
    for (long m = 0; m < M; m++) {
        float s[E + 7];
        char taken[E];
        memset(taken, 0, E);
        memcpy(s, logits + m * E, E * sizeof(float));
        memset(s + E, 0, 7 * sizeof(float));
        for (long e = 0; e < E; e += 8) store(s + e, vsigmoid(load(s + e)));
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
