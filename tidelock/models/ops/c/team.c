#define _GNU_SOURCE
#include "team.h"

#ifndef __linux__ /* no futex */

void tl_share(long n, void (*f)(const void *, long), const void *of) {
#pragma omp parallel for schedule(dynamic, 1)
    for (long t = 0; t < n; t++) f(of, t);
}

#else
#include <limits.h>
#include <linux/futex.h>
#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MOST 256
#define LOOK 64          /* pauses between two looks at the clock, with a yield: somebody else may need this processor */
#define PATIENCE_NS 15000 /* of a thread with nothing to do, before it sleeps: longer than most of a decode's steps; with 60 us the
                            OpenMP loops between ours wanted the same processor, and batches of 32 were a tenth slower */

/* The high half of `left` counts loops, the low half the tasks of the present one that nobody has taken. A thread takes
 * one by exchanging it, so a late thread can take none of another loop's; and as a loop ends only when all its tasks are
 * done, what `work`, `arg` and `tasks` say is what they say of the task that was taken. */
static _Atomic uint64_t left;
static void (*_Atomic work)(const void *, long);
static const void *_Atomic arg;
static _Atomic long tasks, done;

static _Atomic uint32_t bell, sleepers; /* rung at every loop; a futex */
static _Atomic int wanted;              /* helpers of the present loop */
static int started;
static pthread_mutex_t one_caller = PTHREAD_MUTEX_INITIALIZER;

static inline void rest(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static uint64_t nanoseconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/* Takes and does a thread's share of the tasks that are left, one behind the other; 0 if there were none. What a thread
 * reads is then one stretch of memory, and what it has read ahead is not another's. */
static int take(void) {
    uint64_t seen = atomic_load(&left);
    while ((uint32_t)seen) {
        long some = (uint32_t)seen / (atomic_load(&wanted) + 1);
        if (some < 1) some = 1;
        if (atomic_compare_exchange_weak(&left, &seen, seen - some)) {
            void (*f)(const void *, long) = atomic_load(&work);
            const void *of = atomic_load(&arg);
            long t = atomic_load(&tasks) - (uint32_t)seen;
            for (long end = t + some; t < end; t++) f(of, t);
            atomic_fetch_add(&done, some);
            return 1;
        }
    }
    return 0;
}

static void sleep_until(uint32_t rung) {
    atomic_fetch_add(&sleepers, 1);
    if (!(uint32_t)atomic_load(&left)) syscall(SYS_futex, &bell, FUTEX_WAIT_PRIVATE, rung, 0, 0, 0);
    atomic_fetch_sub(&sleepers, 1);
}

static void *help(void *number) {
    for (;;) {
        uint32_t rung = atomic_load(&bell);
        if ((intptr_t)number >= atomic_load(&wanted)) { /* too many for this loop */
            syscall(SYS_futex, &bell, FUTEX_WAIT_PRIVATE, rung, 0, 0, 0);
            continue;
        }
        if (take()) continue;
        uint64_t until = nanoseconds() + PATIENCE_NS;
        for (long n = 1; atomic_load(&bell) == rung; n++) {
            rest();
            if (n % LOOK) continue;
            sched_yield();
            if (nanoseconds() < until) continue;
            sleep_until(rung);
            break;
        }
    }
    return 0;
}

static void alone_after_fork(void) { /* a child has no helpers yet */
    started = 0;
    atomic_store(&left, 0);
    atomic_store(&sleepers, 0);
    pthread_mutex_init(&one_caller, 0);
}

static void start(int helpers) {
    if (!started) pthread_atfork(0, 0, alone_after_fork);
    for (; started < helpers; started++) {
        pthread_t thread;
        if (pthread_create(&thread, 0, help, (void *)(intptr_t)started)) return;
        pthread_detach(thread);
    }
}

void tl_share(long n, void (*f)(const void *, long), const void *of) {
    int helpers = omp_get_max_threads() - 1;
    if (helpers > MOST) helpers = MOST;
    if (n < 2 || helpers < 1 || pthread_mutex_trylock(&one_caller)) {
        for (long t = 0; t < n; t++) f(of, t);
        return;
    }
    if (started < helpers) start(helpers);
    atomic_store(&work, f);
    atomic_store(&arg, of);
    atomic_store(&tasks, n);
    atomic_store(&done, 0);
    int before = atomic_exchange(&wanted, helpers);
    atomic_store(&left, (atomic_load(&left) & ~0xffffffffull) + (1ull << 32) + n);
    atomic_fetch_add(&bell, 1);
    if (atomic_load(&sleepers) || before < helpers) syscall(SYS_futex, &bell, FUTEX_WAKE_PRIVATE, INT_MAX, 0, 0, 0);
    while (take()) {}
    for (long k = 1; atomic_load(&done) < n; k++) {
        rest();
        if (k % LOOK == 0) sched_yield();
    }
    pthread_mutex_unlock(&one_caller);
}

#endif
