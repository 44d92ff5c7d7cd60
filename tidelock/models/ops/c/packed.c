/* Matrix products straight from packed weights: fp32 activations, fp32 sums, k ascending for every output.
 *
 * A weight is turned into its fp32 value (one exact or once-rounded step) and then meets a fused multiply-add, in the
 * order of k, in one sum. So the bits are those of the fp32 product with the unpacked weights, and they depend neither
 * on the rows that come along nor on the tile, the thread or the vector width that computes them. */
#include "packed.h"

typedef uint32_t uw __attribute__((vector_size(VW * 4), aligned(4)));
typedef uint8_t bw __attribute__((vector_size(VW), aligned(1)));
typedef int8_t sw __attribute__((vector_size(VW), aligned(1)));

#define STRIP (2 * VW) /* outputs of a panel that are computed at once */
#if VW == 16
#define ROWS 12 /* rows of x at once: 24 sums of the 32 registers */
#else
#define ROWS 6
#endif
#define AHEAD 4096 /* bytes: with many products per weight, the processor's own prefetch is not far enough ahead */
#define MANY 48 /* rows from which weights are unpacked into memory once, and no more in registers for every tile */

static const int row_bytes[] = {128, 64, 64, 32, 16, 16};

/* Bytes to words, by name: the compiler's own way round is ten times slower. */
INLINE uw from_u8(const char *p) {
#if VW == 16
    return (uw)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p));
#elif defined(__AVX2__)
    return (uw)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p));
#else
    return __builtin_convertvector(*(const bw *)p, uw);
#endif
}
INLINE vw from_i8(const char *p) {
#if VW == 16
    return (vw)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)));
#elif defined(__AVX2__)
    return (vw)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)));
#else
    return __builtin_convertvector(__builtin_convertvector(*(const sw *)p, iw), vw);
#endif
}

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
static const float int4[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

/* Values of 4-bit codes. */
INLINE vw nibbles(const int kind, uw code) {
#if VW == 16
    return (vw)_mm512_permutexvar_ps((__m512i)code, _mm512_loadu_ps(kind == INT4 ? int4 : e2m1));
#else
    if (kind == INT4) return __builtin_convertvector((iw)(code & 15) - 8, vw);
#ifdef __AVX2__
    return (vw)((uw)_mm256_permutevar8x32_ps(_mm256_loadu_ps(e2m1), (__m256i)code) | (code & 8) << 28);
#else
    vw out;
    for (int i = 0; i < VW; i++) out[i] = e2m1[code[i] & 15];
    return out;
#endif
#endif
}

/* The STRIP weights at `row` of a panel, columns strip * STRIP on, before scaling. */
INLINE void unpack_row(const int kind, const char *row, const int strip, vw *a, vw *b) {
    const int c = strip * STRIP;
    if (kind == F32) {
        *a = *(const vw *)(row + 4 * c);
        *b = *(const vw *)(row + 4 * (c + VW));
    } else if (kind == F16) {
        *a = from_f16(row + 2 * c);
        *b = from_f16(row + 2 * (c + VW));
    } else if (kind == INT8) {
        *a = from_i8(row + c);
        *b = from_i8(row + c + VW);
    } else if (VW == 16) { /* both halves of what was loaded once */
        if (kind == BF16) {
            uw x = *(const uw *)row;
            *a = bf16_low(x);
            *b = bf16_high(x);
        } else {
            uw x = from_u8(row);
            *a = nibbles(kind, x);
            *b = nibbles(kind, x >> 4);
        }
    } else { /* strip 0: the low halves of the row, strip 1: the high ones */
        if (kind == BF16) {
            uw x = *(const uw *)row, y = *(const uw *)(row + 4 * VW);
            *a = strip ? bf16_high(x) : bf16_low(x);
            *b = strip ? bf16_high(y) : bf16_low(y);
        } else {
            uw x = from_u8(row), y = from_u8(row + VW);
            *a = nibbles(kind, x >> 4 * strip);
            *b = nibbles(kind, y >> 4 * strip);
        }
    }
}

/* Scales of a strip: one per output (int8) or one per output and group of inputs. */
INLINE void scales(const int kind, const char *s, const int strip, vw *a, vw *b) {
    unpack_row(kind == INT8 ? F32 : BF16, s, strip, a, b);
}

/* R rows of x against P panels, one strip of each. */
INLINE void strip_product(const int kind, const int R, const int P, const int strip, long K, const float *x, long xr,
                          const char *w, long wp, const char *s, long sp, float *out, long outr, long cols) {
    vw c[4][ROWS][2], s0[4], s1[4]; /* of which P, R: as variable-length arrays they would live in memory */
    const int rb = row_bytes[kind], grouped = kind == INT4 || kind == MXFP4;
    for (int p = 0; p < P; p++) {
        for (int r = 0; r < R; r++) c[p][r][0] = c[p][r][1] = splatw(0);
        if (kind == INT8) scales(kind, s + p * sp, strip, s0 + p, s1 + p);
    }
    for (long g = 0; g < K; g += grouped ? GROUP : K) {
        if (grouped)
            for (int p = 0; p < P; p++) scales(kind, s + p * sp + g / GROUP * 64, strip, s0 + p, s1 + p);
        long end = grouped ? g + GROUP : K;
        for (long k = g; k < end; k++)
            for (int p = 0; p < P; p++) {
                vw w0, w1;
                if (R > 3) __builtin_prefetch(w + p * wp + k * rb + AHEAD);
                if (R > 3 && rb > 64) __builtin_prefetch(w + p * wp + k * rb + 64 + AHEAD);
                unpack_row(kind, w + p * wp + k * rb, strip, &w0, &w1);
                if (kind >= INT8) w0 = w0 * s0[p], w1 = w1 * s1[p];
                for (int r = 0; r < R; r++) {
                    vw a = splatw(x[r * xr + k]);
                    c[p][r][0] = fmaw(a, w0, c[p][r][0]);
                    c[p][r][1] = fmaw(a, w1, c[p][r][1]);
                }
            }
    }
    for (int p = 0; p < P; p++)
        for (int r = 0; r < R; r++) {
            long first = p * PANEL + strip * STRIP, room = cols - first;
            float *to = out + r * outr + first;
            if (room >= STRIP) {
                storew(to, c[p][r][0]);
                storew(to + VW, c[p][r][1]);
            } else if (room > 0) {
                float tail[STRIP];
                storew(tail, c[p][r][0]);
                storew(tail + VW, c[p][r][1]);
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
    DEFINE(kind, 6, 1) DEFINE(kind, 1, 4) DEFINE(kind, 2, 2) DEFINE(kind, 3, 2)
#define TO_6(kind) 0, NAME(kind, 1, 1), NAME(kind, 2, 1), NAME(kind, 3, 1), NAME(kind, 4, 1), NAME(kind, 5, 1), NAME(kind, 6, 1)
#define BESIDE_TO_3(kind) 0, NAME(kind, 1, 4), NAME(kind, 2, 2), NAME(kind, 3, 2)
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
INLINE long abreast(long rows) { return rows == 1 ? 4 : 2; }

/* A panel as fp32 [K, 32]. */
INLINE void unpack_panel(const int kind, long K, const char *w, const char *s, float *to) {
    vw s0 = splatw(1), s1 = s0;
    for (int strip = 0; strip < PANEL / STRIP; strip++)
        for (long k = 0; k < K; k++) {
            vw w0, w1;
            unpack_row(kind, w + k * row_bytes[kind], strip, &w0, &w1);
            if (kind == INT8 && k == 0) scales(kind, s, strip, &s0, &s1);
            if (kind > INT8 && k % GROUP == 0) scales(kind, s + k / GROUP * 64, strip, &s0, &s1);
            if (kind >= INT8) w0 = w0 * s0, w1 = w1 * s1;
            storew(to + k * PANEL + strip * STRIP, w0);
            storew(to + k * PANEL + strip * STRIP + VW, w1);
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
    const long K = W->k, wp = K * row_bytes[W->kind], sp = W->kind >= INT4 ? K / GROUP * 64 : 128;
    while (panel < upto) {
        const char *w = W->w + (e * W->panels + panel) * wp, *s = W->scale ? W->scale + (e * W->panels + panel) * sp : 0;
        float *to = out + panel * PANEL;
        long cols = W->n - panel * PANEL, take = 1;
        if (M <= FEW && M > 0 && upto - panel >= abreast(M)) {
            take = abreast(M);
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

#define TASK 4 /* panels a thread takes at a time */
#define WORTH_THREADS 1500000 /* products: about as long as waking a thread that sleeps */

void tl_packed_linear(long M, const float *x, long xr, const Weight *w, float *out, long outr) {
    long tasks = (w->panels + TASK - 1) / TASK;
#pragma omp parallel for schedule(dynamic, 1) if (M * w->n * w->k > WORTH_THREADS)
    for (long t = 0; t < tasks; t++)
        tl_product(M, x, xr, w, 0, out, outr, t * TASK, MIN((t + 1) * TASK, w->panels));
}

void tl_packed_head_linear(long M, const float *x, long xr, const Weight *w, long H, float *out, long outr, long part) {
#pragma omp parallel for schedule(dynamic, 1) if (M * H * w->n * w->k > WORTH_THREADS)
    for (long h = 0; h < H; h++) tl_product(M, x + h * (xr / H), xr, w, h, out + h * part, outr, 0, w->panels);
}

void tl_packed_grouped_linear(long G, const int64_t *off, const float *x, const Weight *w, float *out) {
    long active[G], n = 0, tasks = (w->panels + TASK - 1) / TASK;
    for (long g = 0; g < G; g++)
        if (off[g + 1] > off[g]) active[n++] = g;
#pragma omp parallel for schedule(dynamic, 1) if (off[G] * w->n * w->k > WORTH_THREADS)
    for (long t = 0; t < n * tasks; t++) {
        long g = active[t / tasks], p = t % tasks * TASK;
        tl_product(off[g + 1] - off[g], x + off[g] * w->k, w->k, w, g, out + off[g] * w->n, w->n, p,
                   MIN(p + TASK, w->panels));
    }
}

/* Matrix e as fp32 rows [k, n]: what the products above compute with. */
void tl_unpack(const Weight *W, long e, float *to) {
    float *flat = tl_scratch(W->k * PANEL);
    const long wp = W->k * row_bytes[W->kind], sp = W->kind >= INT4 ? W->k / GROUP * 64 : 128;
    for (long p = 0; p < W->panels; p++) {
        const char *w = W->w + (e * W->panels + p) * wp;
        if (W->kind == F32) memcpy(flat, w, wp);
        else unpack_any(W->kind, W->k, w, W->scale ? W->scale + (e * W->panels + p) * sp : 0, flat);
        for (long k = 0; k < W->k; k++)
            memcpy(to + k * W->n + p * PANEL, flat + k * PANEL, MIN(PANEL, W->n - p * PANEL) * sizeof(float));
    }
}
