/* The pool: workers sleep on a condition, join an open job, and take blocks from an atomic counter.
 *
 * A worker that wakes too late finds the job closed and goes back to sleep, so nobody waits for it. A forked child
 * has no workers: it starts with an empty pool. A second caller at the same time works alone.
 *
 * Where the caller brings a team of its own (et_use_team), that one works instead: two pools that wait for work by
 * spinning would take the cores from each other. */
#define _GNU_SOURCE
#include "threads.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

enum { MAX_WORKERS = 127, BLOCKS_PER_THREAD = 4, SPINS = 2000 };

/* Waking a worker costs several microseconds: below this many bytes a thread one core is done sooner. */
static const int64_t BYTES_PER_THREAD = 128 * 1024;

static struct {
    pthread_mutex_t submit, lock;
    pthread_cond_t work, done;
    int workers, wanted, active;
    bool open;
    _Atomic uint64_t generation;
    et_body body;
    const void *job;
    int64_t items, block;
    _Atomic int64_t next;
} pool = {.submit = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER,
          .work = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};

static _Atomic(et_team) borrowed;

static inline void pause_cpu(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void take_blocks(void) {
    for (;;) {
        int64_t begin = atomic_fetch_add(&pool.next, pool.block);
        if (begin >= pool.items) return;
        int64_t end = begin + pool.block < pool.items ? begin + pool.block : pool.items;
        pool.body(pool.job, begin, end);
    }
}

static void *worker(void *unused) {
    (void)unused;
    uint64_t seen = 0;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        if (pool.open && pool.generation != seen && pool.wanted > 0) {
            seen = pool.generation;
            pool.wanted--;
            pool.active++;
            pthread_mutex_unlock(&pool.lock);
            take_blocks();
            pthread_mutex_lock(&pool.lock);
            if (--pool.active == 0) pthread_cond_signal(&pool.done);
        }
        uint64_t now = pool.generation;
        pthread_mutex_unlock(&pool.lock);
        for (int spin = 0; spin < SPINS && atomic_load_explicit(&pool.generation, memory_order_relaxed) == now; spin++)
            pause_cpu();
        pthread_mutex_lock(&pool.lock);
        while (!(pool.open && pool.generation != seen && pool.wanted > 0)) pthread_cond_wait(&pool.work, &pool.lock);
    }
    return NULL;
}

static void forget_workers(void) {
    pthread_mutex_init(&pool.submit, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.work, NULL);
    pthread_cond_init(&pool.done, NULL);
    pool.workers = pool.wanted = pool.active = 0;
    pool.open = false;
    atomic_store(&borrowed, NULL);  /* its threads have stayed in the parent */
}

static void register_child(void) { pthread_atfork(NULL, NULL, forget_workers); }

static void watch_forks(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, register_child);
}

static void add_workers(int count) {
    watch_forks();
    while (pool.workers < count && pool.workers < MAX_WORKERS) {
        pthread_t thread;
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        int failed = pthread_create(&thread, &attributes, worker, NULL);
        pthread_attr_destroy(&attributes);
        if (failed) return;  /* fewer threads are slower, not wrong */
        pool.workers++;
    }
}

typedef struct { et_body body; const void *job; int64_t items, block; _Atomic int64_t next; } shared_job;

static void share_blocks(void *data) {
    shared_job *shared = data;
    for (;;) {
        int64_t begin = atomic_fetch_add(&shared->next, shared->block);
        if (begin >= shared->items) return;
        int64_t end = begin + shared->block;
        shared->body(shared->job, begin, end < shared->items ? end : shared->items);
    }
}

void et_use_team(et_team team) {
    watch_forks();
    atomic_store(&borrowed, team);
}

/* With block 0 the items are cut into a few blocks a thread. */
static void run_blocks(et_body body, const void *job, int64_t items, int64_t block, int64_t bytes, int threads) {
    if (items <= 0) return;
    int64_t useful = bytes / BYTES_PER_THREAD;
    if (threads > useful) threads = (int)useful;
    if (threads > items) threads = (int)items;
    int64_t blocks = (int64_t)threads * BLOCKS_PER_THREAD;
    if (block == 0 && threads > 1) block = (items + blocks - 1) / blocks;
    et_team team = atomic_load(&borrowed);
    if (threads > 1 && team != NULL) {
        shared_job shared = {.body = body, .job = job, .items = items, .block = block};
        team(share_blocks, &shared, (unsigned)threads, 0);
        return;
    }
    if (threads <= 1 || pthread_mutex_trylock(&pool.submit) != 0) {
        body(job, 0, items);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    add_workers(threads - 1);
    pool.body = body;
    pool.job = job;
    pool.items = items;
    pool.block = block;
    atomic_store(&pool.next, 0);
    pool.wanted = threads - 1;
    pool.open = true;
    pool.generation++;
    pthread_cond_broadcast(&pool.work);
    pthread_mutex_unlock(&pool.lock);
    take_blocks();
    pthread_mutex_lock(&pool.lock);
    pool.open = false;
    while (pool.active > 0) pthread_cond_wait(&pool.done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
    pthread_mutex_unlock(&pool.submit);
}

void et_parallel(et_body body, const void *job, int64_t items, int64_t bytes, int threads) {
    run_blocks(body, job, items, 0, bytes, threads);
}

void et_parallel_each(et_body body, const void *job, int64_t items, int64_t bytes, int threads) {
    run_blocks(body, job, items, 1, bytes, threads);
}
