/* A small OpenMP runtime for ThreadSanitizer, which does not understand the barriers of gcc's own, libgomp. It has the
 * functions that gcc's code for run.c calls, on POSIX threads, whose barriers ThreadSanitizer knows. The threads share
 * out loops by relaxed atomic operations, which order nothing else: a mutex would hide races.
 */
#define _GNU_SOURCE // for pthread_barrier_t
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>

typedef struct {
    void (*function)(void *);
    void *data;
    unsigned number;
} Member; // of the team

enum { MAX_THREADS = 64, SLOTS = 16 };
static pthread_barrier_t barrier;
static unsigned team_size = 1;
static unsigned long long
    taken[SLOTS]; // the iterations of a loop that threads have taken; loops take turns in the slots
static _Thread_local unsigned thread_number;
static _Thread_local struct {
    unsigned long long start, end, step, chunk;
    unsigned slot;
} loop;

int omp_get_thread_num(void);
int omp_get_num_threads(void);
void GOMP_barrier(void);
void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags);
bool GOMP_loop_ull_nonmonotonic_dynamic_next(unsigned long long *first, unsigned long long *end);
bool GOMP_loop_ull_nonmonotonic_dynamic_start(bool up, unsigned long long start, unsigned long long end,
                                              unsigned long long step, unsigned long long chunk,
                                              unsigned long long *first, unsigned long long *last);
void GOMP_loop_end(void);
void GOMP_loop_end_nowait(void);

int omp_get_thread_num(void) { return (int)thread_number; }

int omp_get_num_threads(void) { return (int)team_size; }

void GOMP_barrier(void) {
    if (team_size > 1)
        pthread_barrier_wait(&barrier);
}

static void *run_member(void *argument) {
    Member *member = argument;
    thread_number = member->number;
    loop.slot = 0;
    member->function(member->data);
    return NULL;
}

void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags) {
    pthread_t others[MAX_THREADS];
    Member members[MAX_THREADS];
    (void)flags;
    if (threads < 1 || threads > MAX_THREADS)
        abort();
    team_size = threads;
    pthread_barrier_init(&barrier, NULL, threads);
    for (unsigned i = 0; i < threads; i++) {
        members[i] = (Member){function, data, i};
        if (i > 0 && pthread_create(&others[i], NULL, run_member, &members[i]))
            abort();
    }
    run_member(&members[0]);
    for (unsigned i = 1; i < threads; i++)
        pthread_join(others[i], NULL);
    pthread_barrier_destroy(&barrier);
    team_size = 1;
}

bool GOMP_loop_ull_nonmonotonic_dynamic_next(unsigned long long *first, unsigned long long *end) {
    unsigned long long share = loop.step * loop.chunk;
    unsigned long long n = __atomic_fetch_add(&taken[loop.slot], 1, __ATOMIC_RELAXED);
    *first = loop.start + n * share;
    *end = *first + share < loop.end ? *first + share : loop.end;
    return *first < loop.end;
}

bool GOMP_loop_ull_nonmonotonic_dynamic_start(bool up, unsigned long long start, unsigned long long end,
                                              unsigned long long step, unsigned long long chunk,
                                              unsigned long long *first, unsigned long long *last) {
    if (!up)
        abort(); // run.c has no such loop
    loop.start = start;
    loop.end = end;
    loop.step = step;
    loop.chunk = chunk;
    return GOMP_loop_ull_nonmonotonic_dynamic_next(first, last);
}

// All threads have taken what they need. The slot is needed again SLOTS loops, and as many barriers, later.
void GOMP_loop_end(void) {
    GOMP_barrier();
    __atomic_store_n(&taken[loop.slot], 0, __ATOMIC_RELAXED);
    loop.slot = (loop.slot + 1) % SLOTS;
}

// run.c has no loop like this; it is for the tests of this runtime, which take a barrier away.
void GOMP_loop_end_nowait(void) { loop.slot = (loop.slot + 1) % SLOTS; }
