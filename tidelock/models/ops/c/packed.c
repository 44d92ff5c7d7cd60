/* Matrix products straight from packed weights: fp32 activations, fp32 sums, k ascending for every output.
 *
 * A weight is turned into its fp32 value (one exact or once-rounded step) and then meets a fused multiply-add, in the
 * order of k, in one sum. So the bits are those of the fp32 product with the unpacked weights, and they depend neither
 * on the rows that come along nor on the tile, the thread or the vector width that computes them. */
#include "packed.h"
#include "team.h"

typedef uint32_t uw __attribute__((vector_size(VW * 4), aligned(4)));

#define STRIP (2 * VW) /* outputs of a panel that are computed at once */
#if VW == 16
#define ROWS 12 /* rows of x at once: 24 sums of the 32 registers */
#else
#define ROWS 6
#endif

#define AHEAD 4096 /* bytes: the processor's own prefetch is not far enough ahead; half the time, from memory, without */
#define MANY 48 /* rows from which weights are unpacked into memory once, and no more in registers for every tile */

/* Inputs that share a word: every lane of a row of words is an output, its first input in the lowest bits. */
#define PER(kind) (kind == INT8 ? 4 : kind > INT8 ? 8 : 1)
#define ROW(kind) (kind == F32 || kind >= INT8 ? 128 : 64) /* bytes, of PER inputs */

INLINE long panel_bytes(const int kind, long K) { return (K + PER(kind) - 1) / PER(kind) * ROW(kind); }
INLINE long scale_bytes(const int kind, long K) { return kind > INT8 ? K / GROUP * 64 : 128; }

INLINE vw bf16_low(uw x) { return (vw)(x << 16); }
INLINE vw bf16_high(uw x) { return (vw)(x & 0xffff0000u); }

INLINE vw from_f16(const char *p) {
#if VW == 16
    return (vw)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));
#elif defined(__F16C__)
    return (vw)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p));
#else
    vw out;
    for (int i = 0; i < VW; i++) { /* the exponent is rebiased by a product, which makes subnormals right as well */
        uint32_t h = ((const uint16_t *)p)[i];
        union { uint32_t u; float f; } v = {(h & 0x7fff) << 13};
        v.f *= 0x1p112f;
        v.u |= (h & 0x8000) << 16;
        out[i] = v.f;
    }
    return out;
#endif
}

static const float e2m1[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

/* x's bits `mask` moved to the left by `shift`, under the exponent of `one`: a code u of n bits becomes 2^n + u. */
INLINE vw mantissa(uw x, const int shift, const uint32_t mask, const uint32_t one) {
    x = shift >= 0 ? x << shift : x >> -shift;
#if VW == 16
    return (vw)_mm512_ternarylogic_epi32((__m512i)x, _mm512_set1_epi32(mask), _mm512_set1_epi32(one), 0xea); /* a & b | c */
#else
    return (vw)((x & mask) | one);
#endif
}

/* Input j of words that hold codes, times s. INT8 and INT4 hold them plus half their range; t is what that half and the
 * exponent add, -(2^n + 2^(n - 1)) s. It is exact, as is the product inside the fma, so one rounding is left: that of
 * code * s. (INT8's scales have 22 bits for that; with 4 bits even code * s is exact.) */
INLINE vw decoded(const int kind, const int j, uw x, vw s, vw t) {
    if (kind == INT8) return fmaw(mantissa(x, 15 - 8 * j, 0x007f8000, 0x43800000), s, t);
    if (kind == INT4) return fmaw(mantissa(x, 19 - 4 * j, 0x00780000, 0x41800000), s, t);
#if VW == 16
    return (vw)_mm512_permutexvar_ps((__m512i)(x >> 4 * j), _mm512_loadu_ps(e2m1)) * s;
#elif defined(__AVX2__)
    uw code = x >> 4 * j;
    return (vw)((uw)_mm256_permutevar8x32_ps(_mm256_loadu_ps(e2m1), (__m256i)code) | (code & 8) << 28) * s;
#else
    vw out;
    for (int i = 0; i < VW; i++) out[i] = e2m1[x[i] >> 4 * j & 15];
    return out * s;
#endif
}
INLINE vw offset(const int kind, vw s) { return s * splatw(kind == INT8 ? -384.0f : -24.0f); }

/* The STRIP weights at `row` of a panel, columns strip * STRIP on, of the kinds that are not coded. */
INLINE void unpack_row(const int kind, const char *row, const int strip, vw *a, vw *b) {
    const int c = strip * STRIP;
    if (kind == F32) {
        *a = *(const vw *)(row + 4 * c);
        *b = *(const vw *)(row + 4 * (c + VW));
    } else if (kind == F16) {
        *a = from_f16(row + 2 * c);
        *b = from_f16(row + 2 * (c + VW));
    } else if (VW == 16) { /* both halves of what was loaded once */
        uw x = *(const uw *)row;
        *a = bf16_low(x);
        *b = bf16_high(x);
    } else { /* strip 0: the low halves of the row, strip 1: the high ones */
        uw x = *(const uw *)row, y = *(const uw *)(row + 4 * VW);
        *a = strip ? bf16_high(x) : bf16_low(x);
        *b = strip ? bf16_high(y) : bf16_low(y);
    }
}

/* One strip's scales and what `decoded` adds: one per output (INT8) or one per output and group of inputs. */
INLINE void scales(const int kind, const char *s, const int strip, vw *scale, vw *off) {
    unpack_row(kind == INT8 ? F32 : BF16, s, strip, scale, scale + 1);
    off[0] = offset(kind, scale[0]), off[1] = offset(kind, scale[1]);
}

typedef struct { /* R rows of x against P panels, one strip of each */
    vw c[2][ROWS][2];
} Sums;

INLINE void add_products(const int R, const int p, Sums *sums, const float *x, long xr, vw w0, vw w1) {
    for (int r = 0; r < R; r++) {
        vw a = splatw(x[r * xr]);
        sums->c[p][r][0] = fmaw(a, w0, sums->c[p][r][0]);
        sums->c[p][r][1] = fmaw(a, w1, sums->c[p][r][1]);
    }
}

/* Of P panels read abreast the one behind a panel is being read already; what comes next lies behind all of them. */
INLINE void ahead(const int kind, const int P, long k, const char *row, long wp) {
    const char *next = row + AHEAD + (P > 1 && k / PER(kind) * ROW(kind) + AHEAD >= wp ? (P - 1) * wp : 0);
    __builtin_prefetch(next);
    if (ROW(kind) > 64) __builtin_prefetch(next + 64);
}

/* Inputs k .. k + n of codes, n at most PER. */
INLINE void add_words(const int kind, const int R, const int P, const int strip, const int n, long k, Sums *sums,
                      const float *x, long xr, const char *w, long wp, vw (*s)[2], vw (*t)[2]) {
    uw words[2][2];
    for (int p = 0; p < P; p++) {
        const char *row = w + p * wp + k / PER(kind) * ROW(kind);
        ahead(kind, P, k, row, wp);
        words[p][0] = *(const uw *)(row + 4 * strip * STRIP);
        words[p][1] = *(const uw *)(row + 4 * (strip * STRIP + VW));
    }
#pragma GCC unroll 8
    for (int j = 0; j < n; j++)
        for (int p = 0; p < P; p++)
            add_products(R, p, sums, x + k + j, xr, decoded(kind, j, words[p][0], s[p][0], t[p][0]),
                         decoded(kind, j, words[p][1], s[p][1], t[p][1]));
}

INLINE void strip_product(const int kind, const int R, const int P, const int strip, long K, const float *x, long xr,
                          const char *w, long wp, const char *s, long sp, float *out, long outr, long cols) {
    Sums sums;
    vw scale[2][2], off[2][2];
    for (int p = 0; p < P; p++)
        for (int r = 0; r < R; r++) sums.c[p][r][0] = sums.c[p][r][1] = splatw(0);
    if (kind < INT8)
        for (long k = 0; k < K; k++)
            for (int p = 0; p < P; p++) {
                const char *row = w + p * wp + k * ROW(kind);
                vw w0, w1;
                ahead(kind, P, k, row, wp);
                unpack_row(kind, row, strip, &w0, &w1);
                add_products(R, p, &sums, x + k, xr, w0, w1);
            }
    else {
        const long group = kind == INT8 ? K : GROUP;
        long k = 0;
        for (long g = 0; g < K; g += group) {
            for (int p = 0; p < P; p++) scales(kind, s + p * sp + g / GROUP * 64 * (kind > INT8), strip, scale[p], off[p]);
            for (; k + PER(kind) <= g + group; k += PER(kind))
                add_words(kind, R, P, strip, PER(kind), k, &sums, x, xr, w, wp, scale, off);
        }
        if (kind == INT8)
            for (const int left = K - k; k < K; k = K) /* at most three */
                left == 1   ? add_words(kind, R, P, strip, 1, k, &sums, x, xr, w, wp, scale, off)
                : left == 2 ? add_words(kind, R, P, strip, 2, k, &sums, x, xr, w, wp, scale, off)
                            : add_words(kind, R, P, strip, 3, k, &sums, x, xr, w, wp, scale, off);
    }
    for (int p = 0; p < P; p++)
        for (int r = 0; r < R; r++) {
            long first = p * PANEL + strip * STRIP, room = cols - first;
            float *to = out + r * outr + first;
            if (room >= STRIP) {
                storew(to, sums.c[p][r][0]);
                storew(to + VW, sums.c[p][r][1]);
            } else if (room > 0) {
                float tail[STRIP];
                storew(tail, sums.c[p][r][0]);
                storew(tail + VW, sums.c[p][r][1]);
                memcpy(to, tail, room * sizeof(float));
            }
        }
}

INLINE void panel_product(const int kind, const int R, const int P, long K, const float *x, long xr, const char *w, long wp,
                          const char *s, long sp, float *out, long outr, long cols) {
    for (int strip = 0; strip < PANEL / STRIP; strip++) {
        if (strip == 0) strip_product(kind, R, P, 0, K, x, xr, w, wp, s, sp, out, outr, cols);
        else strip_product(kind, R, P, 1, K, x, xr, w, wp, s, sp, out, outr, cols);
    }
}

typedef void (*Kernel)(long K, const float *x, long xr, const char *w, long wp, const char *s, long sp, float *out,
                       long outr, long cols);

/* One compiled loop per kind and tile, named k_<kind>_<rows>x<panels>. */
#define DEFINE(kind, R, P)                                                                                             \
    static void k_##kind##_##R##x##P(long K, const float *x, long xr, const char *w, long wp, const char *s, long sp,  \
                                     float *out, long outr, long cols) {                                               \
        panel_product(kind, R, P, K, x, xr, w, wp, s, sp, out, outr, cols);                                            \
    }
#define NAME(kind, R, P) k_##kind##_##R##x##P
#define DEFINE_TO_6(kind) DEFINE(kind, 1, 1) DEFINE(kind, 2, 1) DEFINE(kind, 3, 1) DEFINE(kind, 4, 1) DEFINE(kind, 5, 1) \
    DEFINE(kind, 6, 1) DEFINE(kind, 1, 2) DEFINE(kind, 2, 2) DEFINE(kind, 3, 2)
#define TO_6(kind) 0, NAME(kind, 1, 1), NAME(kind, 2, 1), NAME(kind, 3, 1), NAME(kind, 4, 1), NAME(kind, 5, 1), NAME(kind, 6, 1)
#define BESIDE_TO_3(kind) 0, NAME(kind, 1, 2), NAME(kind, 2, 2), NAME(kind, 3, 2)
#if ROWS == 12
#define DEFINE_ALL(kind) DEFINE_TO_6(kind) DEFINE(kind, 7, 1) DEFINE(kind, 8, 1) DEFINE(kind, 9, 1) DEFINE(kind, 10, 1) \
    DEFINE(kind, 11, 1) DEFINE(kind, 12, 1) DEFINE(kind, 4, 2) DEFINE(kind, 5, 2) DEFINE(kind, 6, 2)
#define ALL(kind) {TO_6(kind), NAME(kind, 7, 1), NAME(kind, 8, 1), NAME(kind, 9, 1), NAME(kind, 10, 1), \
                   NAME(kind, 11, 1), NAME(kind, 12, 1)}
#define BESIDE(kind) {BESIDE_TO_3(kind), NAME(kind, 4, 2), NAME(kind, 5, 2), NAME(kind, 6, 2)}
#else
#define DEFINE_ALL DEFINE_TO_6
#define ALL(kind) {TO_6(kind)}
#define BESIDE(kind) {BESIDE_TO_3(kind)}
#endif
DEFINE_ALL(F32) DEFINE_ALL(BF16) DEFINE_ALL(F16) DEFINE_ALL(INT8) DEFINE_ALL(INT4) DEFINE_ALL(MXFP4)
static const Kernel one_panel[6][ROWS + 1] = {ALL(F32), ALL(BF16), ALL(F16), ALL(INT8), ALL(INT4), ALL(MXFP4)};
/* Few rows leave sums to spare: more panels at once hide the latency of additions, and of memory. */
#define FEW (ROWS / 2)
static const Kernel beside[6][FEW + 1] = {BESIDE(F32), BESIDE(BF16), BESIDE(F16), BESIDE(INT8), BESIDE(INT4), BESIDE(MXFP4)};
/* But a processor reads one stream faster than two, and two much faster than four. One row against numbers that need next to
 * no decoding, in vectors of 16, is through with 64 bytes before the next are there: one panel at a time. */
INLINE long abreast(const int kind, long rows) { return rows == 1 && (kind == F32 || (kind < INT8 && VW == 16)) ? 1 : 2; }

/* A panel as fp32 [K, 32]. */
INLINE void unpack_panel(const int kind, long K, const char *w, const char *s, float *to) {
    for (int strip = 0; strip < PANEL / STRIP; strip++) {
        float *at = to + strip * STRIP;
        vw scale[2] = {splatw(0), splatw(0)}, off[2] = {splatw(0), splatw(0)}, w0, w1;
        if (kind < INT8)
            for (long k = 0; k < K; k++) {
                unpack_row(kind, w + k * ROW(kind), strip, &w0, &w1);
                storew(at + k * PANEL, w0);
                storew(at + k * PANEL + VW, w1);
            }
        else
            for (long k = 0; k < K; k += PER(kind)) {
                const char *row = w + k / PER(kind) * ROW(kind) + 4 * strip * STRIP;
                uw x = *(const uw *)row, y = *(const uw *)(row + 4 * VW);
                if (k % GROUP == 0 && (k == 0 || kind > INT8)) scales(kind, s + k / GROUP * 64, strip, scale, off);
#pragma GCC unroll 8
                for (int j = 0; j < 8; j++)
                    if (j < PER(kind) && k + j < K) {
                        storew(at + (k + j) * PANEL, decoded(kind, j, x, scale[0], off[0]));
                        storew(at + (k + j) * PANEL + VW, decoded(kind, j, y, scale[1], off[1]));
                    }
            }
    }
}

static void unpack_any(int kind, long K, const char *w, const char *s, float *to) {
    switch (kind) {
    case BF16: unpack_panel(BF16, K, w, s, to); break;
    case F16: unpack_panel(F16, K, w, s, to); break;
    case INT8: unpack_panel(INT8, K, w, s, to); break;
    case INT4: unpack_panel(INT4, K, w, s, to); break;
    case MXFP4: unpack_panel(MXFP4, K, w, s, to); break;
    }
}

/* Rows in as even tiles as possible: 13 rows are 7 + 6, not 12 + 1. */
INLINE long tile_rows(long left, long most) {
    long tiles = (left + most - 1) / most;
    return (left + tiles - 1) / tiles;
}

void tl_product(long M, const float *x, long xr, const Weight *W, long e, float *out, long outr, long panel, long upto) {
    const long K = W->k, wp = panel_bytes(W->kind, K), sp = scale_bytes(W->kind, K);
    while (panel < upto) {
        const char *w = W->w + (e * W->panels + panel) * wp, *s = W->scale ? W->scale + (e * W->panels + panel) * sp : 0;
        float *to = out + panel * PANEL;
        long cols = W->n - panel * PANEL, take = 1;
        if (M <= FEW && M > 0 && abreast(W->kind, M) == 2 && upto - panel >= 2) {
            take = 2;
            beside[W->kind][M](K, x, xr, w, wp, s, sp, to, outr, cols);
        } else {
            int kind = W->kind;
            if (kind != F32 && M >= MANY) {
                float *flat = tl_scratch(K * PANEL);
                unpack_any(kind, K, w, s, flat);
                kind = F32, w = (const char *)flat, s = 0;
            }
            for (long m = 0, rows; m < M; m += rows) {
                rows = tile_rows(M - m, ROWS);
                one_panel[kind][rows](K, x + m * xr, xr, w, 0, s, 0, to + m * outr, outr, cols);
            }
        }
        panel += take;
    }
}

#define TASK 2 /* panels; a thread takes several of these one behind the other (team.c) */

typedef struct {
    long M, xr, outr, tasks; /* tasks: of one expert */
    long in_part, out_part;  /* of a head */
    const float *x;
    const Weight *w;
    float *out;
    const int64_t *off;
    const long *active;
} Product;

/* tl_share, if there is work enough for two. */
static void share(long products, long tasks, void (*task)(const void *, long), const Product *p) {
    if (products > WORTH_SHARING) tl_share(tasks, task, p);
    else
        for (long t = 0; t < tasks; t++) task(p, t);
}

static void some_panels(const void *of, long t) {
    const Product *p = of;
    tl_product(p->M, p->x, p->xr, p->w, 0, p->out, p->outr, t * TASK, MIN((t + 1) * TASK, p->w->panels));
}

void tl_packed_linear(long M, const float *x, long xr, const Weight *w, float *out, long outr) {
    Product p = {.M = M, .x = x, .xr = xr, .w = w, .out = out, .outr = outr};
    share(M * w->n * w->k, (w->panels + TASK - 1) / TASK, some_panels, &p);
}

static void one_head(const void *of, long h) {
    const Product *p = of;
    tl_product(p->M, p->x + h * p->in_part, p->xr, p->w, h, p->out + h * p->out_part, p->outr, 0, p->w->panels);
}

void tl_packed_head_linear(long M, const float *x, long xr, const Weight *w, long H, float *out, long outr, long part) {
    Product p = {.M = M, .x = x, .xr = xr, .w = w, .out = out, .outr = outr, .in_part = xr / H, .out_part = part};
    share(M * H * w->n * w->k, H, one_head, &p);
}

static void some_panels_of_one(const void *of, long t) {
    const Product *p = of;
    const Weight *w = p->w;
    long g = p->active[t / p->tasks], panel = t % p->tasks * TASK, begin = p->off[g];
    tl_product(p->off[g + 1] - begin, p->x + begin * w->k, w->k, w, g, p->out + begin * w->n, w->n, panel,
               MIN(panel + TASK, w->panels));
}

void tl_packed_grouped_linear(long G, const int64_t *off, const float *x, const Weight *w, float *out) {
    long active[G], n = 0, tasks = (w->panels + TASK - 1) / TASK;
    for (long g = 0; g < G; g++)
        if (off[g + 1] > off[g]) active[n++] = g;
    Product p = {.x = x, .w = w, .out = out, .off = off, .active = active, .tasks = tasks};
    share(off[G] * w->n * w->k, n * tasks, some_panels_of_one, &p);
}

/* Matrix e as fp32 rows [k, n]: what the products above compute with. */
void tl_unpack(const Weight *W, long e, float *to) {
    float *flat = tl_scratch(W->k * PANEL);
    const long wp = panel_bytes(W->kind, W->k), sp = scale_bytes(W->kind, W->k);
    for (long p = 0; p < W->panels; p++) {
        const char *w = W->w + (e * W->panels + p) * wp;
        if (W->kind == F32) memcpy(flat, w, wp);
        else unpack_any(W->kind, W->k, w, W->scale ? W->scale + (e * W->panels + p) * sp : 0, flat);
        for (long k = 0; k < W->k; k++)
            memcpy(to + k * W->n + p * PANEL, flat + k * PANEL, MIN(PANEL, W->n - p * PANEL) * sizeof(float));
    }
}
