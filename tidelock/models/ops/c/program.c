/* A model's forward as a list of steps, run in one call: decoding one token of a small model is hundreds of steps of a
 * microsecond, and Python between them would cost more than they do.
 *
 * The list is recorded from the layers' own forward (`ops/program.py`); each step below calls the kernel that training
 * calls, or its packed twin, so the bits are the same. A buffer is a [rows, width] value between steps. */
#include "packed.h"

typedef struct {
    int64_t rows, seqs;
    const int64_t *ids;
    const int32_t *cu, *start, *slots, *table;
    int64_t table_width, page_size;
    float *const *pages, *const *states, *const *tails; /* by layer; NULL without a cache */
    int64_t *position, *row;                            /* of every row: absolute position, row in the pages */
} Step;

typedef struct Op Op;
struct Op {
    void (*run)(const Step *, const Op *, float *const *);
    int32_t in[4], out[4], n[6]; /* buffers (-1: none), sizes */
    float f[2];
    const void *p[4]; /* weights and tables */
};

#define STEP(name) void name(const Step *s, const Op *o, float *const *buf)
#define IN(i) buf[o->in[i]]
#define OUT(i) buf[o->out[i]]

void tl_rmsnorm(long, long, const float *, long, const float *, const float *, float, float *, long, float *);
void tl_sigmoid_gate(long, const float *, const float *, float *);
void tl_glu(long, long, int, float, float, const float *, float *);
void tl_attnres(long, long, long, const float *const *, const float *, float, float *, float *, float *);
void tl_router(long, long, long, const float *, const float *, float, int64_t *, float *);
void tl_dispatch(long, long, const int64_t *, int64_t *, int64_t *);
void tl_scatter(long, long, long, const float *, const int64_t *, const float *, float *);
void tl_combine(long, long, long, const float *, const int64_t *, const float *, float *);
void tl_conv(long, const int32_t *, const int32_t *, const int32_t *, long, long, const float *, const float *, float *,
             float *);
void tl_kda_gate(long, long, long, const float *, const float *, const float *, float, float *);
void tl_kda(long, const int32_t *, const int32_t *, const int32_t *, long, long, const float *, const float *, const float *,
            float *, float *, float *, const int32_t *);
void tl_mla(long, const int32_t *, const int32_t *, long, long, long, const float *, const float *, const float *,
            const int32_t *, long, long, float *, float *);

/* n: width, 1 if the table is bf16 */
STEP(op_embed) {
    const long D = o->n[0];
    for (long m = 0; m < s->rows; m++) {
        float *to = OUT(0) + m * D;
        if (!o->n[1]) memcpy(to, (const float *)o->p[0] + s->ids[m] * D, D * sizeof(float));
        else {
            const uint16_t *from = (const uint16_t *)o->p[0] + s->ids[m] * D;
            for (long d = 0; d < D; d++) ((uint32_t *)to)[d] = (uint32_t)from[d] << 16;
        }
    }
}

STEP(op_linear) {
    const Weight *w = o->p[0];
    tl_packed_linear(s->rows, IN(0), w->k, w, OUT(0), w->n);
}

STEP(op_add) { /* n: width */
    const long n = s->rows * o->n[0];
    const float *a = IN(0), *b = IN(1);
    float *to = OUT(0);
    for (long i = 0; i < n; i++) to[i] = a[i] + b[i];
}

STEP(op_concat) { /* n: widths */
    const long A = o->n[0], B = o->n[1];
    for (long m = 0; m < s->rows; m++) {
        memcpy(OUT(0) + m * (A + B), IN(0) + m * A, A * sizeof(float));
        memcpy(OUT(0) + m * (A + B) + A, IN(1) + m * B, B * sizeof(float));
    }
}

STEP(op_rms_norm) { /* n: width, parts of a row that are normed one by one */
    const long D = o->n[0];
    tl_rmsnorm(s->rows * o->n[1], D, IN(0), D, o->p[0], o->in[1] < 0 ? 0 : IN(1), o->f[0], OUT(0), D, 0);
}

STEP(op_sigmoid_gate) { tl_sigmoid_gate(s->rows * o->n[0], IN(0), IN(1), OUT(0)); }

STEP(op_glu) { tl_glu(s->rows * o->n[2], o->n[0], o->n[1], o->f[0], o->f[1], IN(0), OUT(0)); }

STEP(op_mix) { /* n: width, sources; p: weight, the sources' buffers */
    const float *v[o->n[1]];
    for (long j = 0; j < o->n[1]; j++) v[j] = buf[((const int32_t *)o->p[1])[j]];
    tl_attnres(s->rows, o->n[0], o->n[1], v, o->p[0], o->f[0], OUT(0), 0, 0);
}

STEP(op_route) { /* n: experts, chosen */
    tl_router(s->rows, o->n[0], o->n[1], IN(0), o->p[0], o->f[0], (int64_t *)OUT(0), OUT(1));
}

STEP(op_dispatch) { /* n: width, chosen, experts; out: sorted rows, offsets, where */
    tl_dispatch(s->rows * o->n[1], o->n[2], (int64_t *)IN(1), (int64_t *)OUT(2), (int64_t *)OUT(1));
    tl_scatter(s->rows, o->n[1], o->n[0], IN(0), (int64_t *)OUT(2), 0, OUT(0));
}

STEP(op_experts_linear) { tl_packed_grouped_linear(o->n[0], (int64_t *)IN(1), IN(0), o->p[0], OUT(0)); }

STEP(op_combine) { tl_combine(s->rows, o->n[1], o->n[0], IN(0), (int64_t *)IN(1), IN(2), OUT(0)); }

STEP(op_short_conv) { /* n: taps, channels, layer */
    tl_conv(s->seqs, s->cu, s->start, s->slots, o->n[0], o->n[1], IN(0), o->p[0], s->tails ? s->tails[o->n[2]] : 0, OUT(0));
}

STEP(op_kda_gate) { tl_kda_gate(s->rows, o->n[0], o->n[1], IN(0), o->p[0], o->p[1], o->f[0], OUT(0)); }

STEP(op_kda) { /* n: heads, width of one, layer */
    tl_kda(s->seqs, s->cu, s->start, s->slots, o->n[0], o->n[1], IN(0), IN(1), IN(2), s->states ? s->states[o->n[2]] : 0,
           OUT(0), 0, 0);
}

/* Interleaved pairs turned by the angles of a position: cos, sin [positions, D / 2], or NULL for no turn. */
INLINE void turn(long D, const float *x, const float *cos, const float *sin, float scale, float *to) {
    for (long i = 0; i < D; i += 2) {
        float a = x[i], b = x[i + 1];
        if (cos) {
            float even = a * cos[i / 2] - b * sin[i / 2];
            b = a * sin[i / 2] + b * cos[i / 2];
            a = even;
        }
        to[i] = a * scale;
        to[i + 1] = b * scale;
    }
}

STEP(op_latent_rows) { /* n: rank, rope; p: norm weight, cos, sin */
    const long R = o->n[0], P = o->n[1], D = R + P;
    const float *cos = o->p[1], *sin = o->p[2];
    tl_rmsnorm(s->rows, R, IN(0), D, o->p[0], 0, o->f[0], OUT(0), D, 0);
    for (long m = 0; m < s->rows; m++) {
        long at = s->position[m] * (P / 2);
        turn(P, IN(0) + m * D + R, cos ? cos + at : 0, sin + at, 1, OUT(0) + m * D + R);
    }
}

STEP(op_write_pages) { /* n: width, layer */
    if (s->pages)
        for (long m = 0; m < s->rows; m++)
            memcpy(s->pages[o->n[1]] + s->row[m] * o->n[0], IN(0) + m * o->n[0], o->n[0] * sizeof(float));
}

STEP(op_absorb) { /* n: heads, nope, rope, rank; p: weight, cos, sin */
    const long H = o->n[0], K = o->n[1], P = o->n[2], R = o->n[3], D = R + P;
    const float *cos = o->p[1], *sin = o->p[2], scale = o->f[0];
    tl_packed_head_linear(s->rows, IN(0), H * (K + P), o->p[0], H, OUT(0), H * D, D);
#pragma omp parallel for schedule(static) if (s->rows * H * D > 40000)
    for (long m = 0; m < s->rows; m++)
        for (long h = 0; h < H; h++) {
            float *to = OUT(0) + (m * H + h) * D;
            long at = s->position[m] * (P / 2);
            for (long d = 0; d < R; d++) to[d] = to[d] * scale;
            turn(P, IN(0) + (m * H + h) * (K + P) + K, cos ? cos + at : 0, sin + at, scale, to + R);
        }
}

STEP(op_mla) { /* n: heads, width, rank, layer */
    tl_mla(s->seqs, s->cu, s->start, o->n[0], o->n[1], o->n[2], IN(0), IN(1), s->pages ? s->pages[o->n[3]] : 0, s->table,
           s->page_size, s->table_width, OUT(0), 0);
}

STEP(op_expand) { /* n: heads, rank, value */
    const long H = o->n[0], R = o->n[1], V = o->n[2];
    tl_packed_head_linear(s->rows, IN(0), H * R, o->p[0], H, OUT(0), H * V, V);
}

/* Where every row stands. 0 when all positions are below `limit`. */
static int place(const Step *s, long limit) {
    for (long q = 0; q < s->seqs; q++)
        for (long m = s->cu[q]; m < s->cu[q + 1]; m++) {
            long at = s->start[q] + m - s->cu[q];
            if (at >= limit) return 1;
            s->position[m] = at;
            if (s->pages) s->row[m] = s->table[q * s->table_width + at / s->page_size] * s->page_size + at % s->page_size;
        }
    return 0;
}

/* buf: where each buffer lies. Returns 1, having done nothing, when a sequence is longer than `limit`. */
int tl_run(const Step *s, long ops, const Op *op, float *const *buf, long limit) {
    if (place(s, limit)) return 1;
    for (long i = 0; i < ops; i++) op[i].run(s, op + i, buf);
    return 0;
}
