/* A soak: the modes of run.c by turns in one process, until they have processed a number of tokens.
 *
 *     build/soak-native TOKENS TEXT    # at the top of the repository; or: make soak
 *
 * A mode ends in exit(), as a process does, which here jumps back. What it has allocated, mapped and opened is then
 * given back, as the system would do. Resident memory, but for the mapped files, is looked at before that. In each round,
 * it must be at most 1 % more than in the round after the first one, and each output must be that of the first round,
 * but for the speed. The chat runs a tiny model whose context is 24 tokens, so it forgets turns all the time.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <malloc.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

// ---- What a mode leaves behind

enum { MAX_LEFT = 1 << 16, FIRST_FD = 3, LAST_FD = 63 };
static struct {
    void *start;
    size_t mapped; // bytes; 0 if the block was allocated
} leftovers[MAX_LEFT];
static size_t n_left;

static void remember(void *start, size_t mapped) {
    if (n_left == MAX_LEFT)
        abort();
    leftovers[n_left].start = start;
    leftovers[n_left].mapped = mapped;
    n_left++;
}

// The C library's own blocks, such as the line that getline returns, are not in the list.
static void forget(const void *start) {
    for (size_t i = n_left; i-- > 0;)
        if (leftovers[i].start == start) {
            leftovers[i] = leftovers[--n_left];
            return;
        }
}

static int soak_memalign(void **memory, size_t alignment, size_t size) {
    int error = posix_memalign(memory, alignment, size);
    if (!error)
        remember(*memory, 0);
    return error;
}

static void *soak_realloc(void *old, size_t size) {
    forget(old);
    void *block = realloc(old, size);
    remember(block, 0);
    return block;
}

static void soak_free(void *block) {
    forget(block);
    free(block);
}

static void *soak_mmap(size_t size, int protection, int flags, int fd) {
    void *start = mmap(NULL, size, protection, flags, fd, 0);
    if (start != MAP_FAILED)
        remember(start, size);
    return start;
}

static int soak_munmap(void *start, size_t size) {
    forget(start);
    return munmap(start, size);
}

static void give_back(void) {
    for (size_t i = 0; i < n_left; i++)
        if (leftovers[i].mapped)
            munmap(leftovers[i].start, leftovers[i].mapped);
        else
            free(leftovers[i].start);
    n_left = 0;
    malloc_trim(0); // what the C library keeps for later would count as the next mode's
    for (int fd = FIRST_FD; fd <= LAST_FD; fd++)
        close(fd);
}

static jmp_buf end_of_mode;
static int end_status;

static _Noreturn void soak_exit(int status) {
    end_status = status;
    longjmp(end_of_mode, 1);
}

#define main run_main
#define exit(status) soak_exit(status)
#define posix_memalign(memory, alignment, size) soak_memalign(memory, alignment, size)
#define realloc(old, size) soak_realloc(old, size)
#define free(block) soak_free(block)
#define mmap(address, size, protection, flags, fd, offset) soak_mmap(size, protection, flags, fd)
#define munmap(start, size) soak_munmap(start, size)
#include "../run.c"
#undef main
#undef exit
#undef free

// ---- Rounds

enum { MAX_ARGUMENTS = 24 };
#define CHAT_MODEL "tests/corpus/weights/seed-vector"
#define CHAT_TOKENIZER "tests/corpus/tokenizer/seed-chat"
// TEXT is the path of the text.
static const char *const kinds[] = {
    "-n 0 -t 0 --json -i Once",
    "-n 0 -t 1 -s 7 --json -i Once",
    "-n 0 -t 0.5 -p 0.5 -s 8 --draft 7 --probs --json -i Once",
    "-m perplexity --json -f TEXT",
    "-m perplexity --json -f TEXT --stride 100",
    "-m next --json -i Once",
    "-m tokenize -f TEXT",
    "-m chat -s 3 --json -c 20 -z " CHAT_TOKENIZER " " CHAT_MODEL,
};
enum { N_KINDS = sizeof kinds / sizeof *kinds, CHAT_TURNS = 400 };

typedef struct {
    char *bytes;
    size_t n;
} Said;

static Said first[N_KINDS];      // what each work has printed in the first round
static size_t resident[N_KINDS]; // pages, in the second round
static double tokens, most = 0;  // processed so far, and the most memory, as a share of the second round's
static const char *text_path;

// Pages of the process's own. The system maps and unmaps those of the weights file as it likes.
static size_t own_pages(void) {
    size_t all, pages, shared;
    FILE *file = fopen("/proc/self/statm", "r");
    if (!file || fscanf(file, "%zu %zu %zu", &all, &pages, &shared) != 3)
        abort();
    fclose(file);
    return pages - shared;
}

// Adds the tokens that a work reports: as generation and chat do on standard error, or as perplexity.
static void count_tokens(Said out, Said err) {
    double a = 0, b = 0;
    const char *stats = strstr(err.bytes, "prefill: "), *scored = strstr(out.bytes, "{\"tokens\": ");
    if (stats && sscanf(stats, "prefill: %lf tokens, %*f tok/s; decode: %lf", &a, &b) == 2)
        tokens += a + b;
    else if (scored && sscanf(scored, "{\"tokens\": %lf", &a) == 1)
        tokens += a;
}

static void run_once(const char *work) {
    static char words[512];
    static char *argv[MAX_ARGUMENTS];
    snprintf(words, sizeof words, "run %s", work);
    int argc = 0;
    for (char *word = strtok(words, " "); word; word = strtok(NULL, " "))
        argv[argc++] = strcmp(word, "TEXT") ? word : (char *)text_path;
    argv[argc] = NULL;
    if (!setjmp(end_of_mode))
        run_main(argc, argv);
    fflush(stdout);
    fflush(stderr);
}

static void soak_work(size_t i, size_t round) {
    static char messages[CHAT_TURNS * 7 + 1];
    FILE *out = stdout, *err = stderr, *in = stdin;
    Said said = {0}, notes = {0};
    for (size_t at = 0; at + 7 < sizeof messages; at += 7)
        memcpy(messages + at, "he the\n", 7);
    stdout = open_memstream(&said.bytes, &said.n);
    stderr = open_memstream(&notes.bytes, &notes.n);
    stdin = fmemopen(messages, sizeof messages - 1, "r");
    run_once(kinds[i]);
    size_t pages = own_pages();
    fclose(stdout);
    fclose(stderr);
    fclose(stdin);
    stdout = out;
    stderr = err;
    stdin = in;
    give_back();
    if (end_status) {
        fprintf(stderr, "soak: %s: status %d: %s", kinds[i], end_status, notes.bytes);
        exit(1);
    }
    count_tokens(said, notes);
    char *speed = strstr(said.bytes, "\"tok_s\"");
    if (speed)
        *speed = 0;
    free(notes.bytes);
    if (round == 0) {
        first[i] = said;
        return;
    }
    if (strcmp(first[i].bytes, said.bytes)) {
        fprintf(stderr, "soak: round %zu: %s: the output is no longer that of the first round\n", round, kinds[i]);
        exit(1);
    }
    free(said.bytes);
    if (round == 1)
        resident[i] = pages;
    most = fmax(most, (double)pages / (double)resident[i]);
    if (most > 1.01) {
        fprintf(stderr, "soak: round %zu: %s: %zu pages of memory, after %zu\n", round, kinds[i], pages, resident[i]);
        exit(1);
    }
}

int main(int argc, char **argv) {
    if (argc != 3) {
        fprintf(stderr, "usage: soak TOKENS TEXT\n");
        return 2;
    }
    text_path = argv[2];
    mallopt(M_MMAP_THRESHOLD, 1 << 17);  // else the C library changes it as it goes
    setenv("GOMP_SPINCOUNT", "3000", 0); // else run.c would start the program again
    size_t round = 0;
    for (; round < 3 || tokens < atof(argv[1]); round++)
        for (size_t i = 0; i < N_KINDS; i++)
            soak_work(i, round);
    printf(
        "soak: %.0f tokens in %zu rounds of %d kinds of work: the outputs are those of the first round, memory is at "
        "most %.2f %% above that of the second, %zu MB\n",
        tokens, round, (int)N_KINDS, (most - 1) * 100, own_pages() * 4096 >> 20);
    return 0;
}
