/* A parallel for over independent items, on one small pool of threads that stays alive between calls. */
#ifndef EDGETUNE_THREADS_H
#define EDGETUNE_THREADS_H

#include <stdint.h>

typedef void (*et_body)(const void *job, int64_t begin, int64_t end);

/* Calls body(job, begin, end) over blocks that cover [0, items), with at most `threads` threads, the caller among
 * them. `bytes` is what the whole job touches: small jobs run in the caller alone. Results may not depend on how
 * the items are cut. */
void et_parallel(et_body body, const void *job, int64_t items, int64_t bytes, int threads);

/* The same, handed out one by one in their order: for few items of unequal size, the largest first. */
void et_parallel_each(et_body body, const void *job, int64_t items, int64_t bytes, int threads);

/* Runs work(data) on `threads` threads at once and returns when all are done: the signature of OpenMP's
 * GOMP_parallel. et_use_team makes et_parallel use such a team in place of its own pool; NULL ends that. */
typedef void (*et_team)(void (*work)(void *data), void *data, unsigned threads, unsigned flags);
void et_use_team(et_team team);

#endif
