/* Coverage-guided fuzzing with libFuzzer. This program includes run.c and has five targets:
 *
 *     build/fuzz-checked TARGET [flags of libFuzzer] [folders with inputs]
 *
 *     weights    a weights file is opened, and some tokens pass through the model
 *     tokenizer  a tokenizer file is opened, texts are encoded, all ids decoded, and a conversation is rendered
 *     text       a text is encoded with one of several tokenizers, and has to come back when it is decoded
 *     cli        a command line is run; arguments are separated by newlines
 *     chat       a conversation; the first bytes of the input choose the tokenizer, flags and so on, see chat_target
 *
 * An execution may end in exit(), which is no finding: it jumps back, see `execute`. No execution can reach the system.
 * Files, standard streams, memory, the terminal, the clock and the environment are replaced by the functions below. So
 * an input always does the same, and memory that an execution leaves behind is given back when it has ended.
 *
 * Besides what AddressSanitizer and UndefinedBehaviorSanitizer see, it is a finding if
 *   - an error is not one line on standard error with status 1 or 2, or wrong usage prints a result (`check_end`)
 *   - a terminal gets a control character that is not ours, or --json prints something else than JSON (`check_output`)
 *   - the logits of tokens differ between one batch and single tokens (weights)
 *   - the KV cache at the end of a conversation is not that of its tokens, or --draft changes the text (chat)
 *   - an encoded text does not decode to itself, or has control tokens (text), or a token is not in the vocabulary.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sanitizer/asan_interface.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdio_ext.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define FINDING(...) (dprintf(2, "fuzz: " __VA_ARGS__), dprintf(2, "\n"), abort())

// ---- Memory: blocks are taken one after the other, with a gap that AddressSanitizer guards, and never used again in
// the same execution, so that every use after free is seen.

enum { ARENA_BYTES = 64 << 20, GAP = 64 };
static unsigned char *arena;
static size_t arena_used, arena_kept; // executions start at arena_kept

__attribute__((no_sanitize("address"))) static size_t *block_size(void *block) { return (size_t *)block - 1; }
__attribute__((no_sanitize("address"))) static size_t get_size(void *block) { return *block_size(block); }
__attribute__((no_sanitize("address"))) static void set_size(void *block, size_t size) { *block_size(block) = size; }

static void *take_memory(size_t size) {
    if (size > ARENA_BYTES - 2 * GAP - arena_used)
        return NULL;
    unsigned char *block = arena + arena_used + GAP;
    arena_used += GAP + (size + GAP - 1) / GAP * GAP;
    set_size(block, size);
    __asan_unpoison_memory_region(block, size);
    memset(block, 0xa5, size < 4096 ? size : 4096);
    return block;
}

static void fuzz_free(void *block) {
    if (block)
        __asan_poison_memory_region(block, get_size(block));
}

// run.c asks for a byte more than it needs.
static int fuzz_posix_memalign(void **memory, size_t size) {
    *memory = take_memory(size - 1);
    return *memory ? 0 : ENOMEM;
}

static void *fuzz_realloc(void *old, size_t size) {
    void *block = take_memory(size);
    if (block && old) {
        size_t before = get_size(old);
        memcpy(block, old, before < size ? before : size);
        fuzz_free(old);
    }
    return block;
}

static void forget_memory(void) {
    __asan_poison_memory_region(arena + arena_kept, arena_used - arena_kept);
    arena_used = arena_kept;
}

// ---- Files

typedef struct {
    const char *path;
    const unsigned char *bytes;
    size_t size;
} FuzzFile;

enum { MAX_FILES = 4, FIRST_FD = 1000 };
static FuzzFile fuzz_files[MAX_FILES];

static int fuzz_open(const char *path) {
    for (int i = 0; i < MAX_FILES; i++)
        if (fuzz_files[i].path && !strcmp(path, fuzz_files[i].path))
            return FIRST_FD + i;
    errno = ENOENT;
    return -1;
}

static int fuzz_fstat(int fd, struct stat *st) {
    *st = (struct stat){.st_mode = S_IFREG, .st_size = (off_t)fuzz_files[fd - FIRST_FD].size};
    return 0;
}

static ssize_t fuzz_pread(int fd, void *to, size_t n) {
    const FuzzFile *file = &fuzz_files[fd - FIRST_FD];
    n = n < file->size ? n : file->size;
    memcpy(to, file->bytes, n);
    return (ssize_t)n;
}

// A copy of the file that ends where the file does: AddressSanitizer sees what reads past the end.
static void *fuzz_mmap(size_t size, int fd) {
    void *block = size ? take_memory(size) : NULL;
    if (!block) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    if (fd < 0)
        memset(block, 0, size);
    else
        memcpy(block, fuzz_files[fd - FIRST_FD].bytes, size);
    return block;
}

static char *fuzz_realpath(const char *path, char *target) {
    if (fuzz_open(path) < 0)
        return NULL;
    return strcpy(target, path);
}

// ---- Standard streams, the terminal, the clock, the environment

typedef struct {
    unsigned char bytes[1 << 20];
    size_t n;
} Captured;
static Captured captured_out, captured_err;

static ssize_t capture(void *cookie, const char *bytes, size_t n) {
    Captured *to = cookie;
    size_t room = sizeof to->bytes - to->n, kept = n < room ? n : room;
    memcpy(to->bytes + to->n, bytes, kept);
    to->n += kept;
    return (ssize_t)n;
}

static void on_sigint(int signal);
static size_t n_ctrl_c; // in this execution

static void press_ctrl_c(void) {
    n_ctrl_c++;
    on_sigint(SIGINT);
}

// What -f and standard input read. In a conversation, the byte 3 is a Ctrl-C at this place.
static bool has_ctrl_c;
static const unsigned char *text_bytes;
static size_t text_size, text_at;
static FILE *text_stream;

static ssize_t read_text(void *cookie, char *to, size_t n) {
    (void)cookie;
    size_t count = 0;
    while (count < n && text_at < text_size && !(has_ctrl_c && text_bytes[text_at] == 3))
        to[count++] = (char)text_bytes[text_at++];
    if (count > 0 || text_at == text_size)
        return (ssize_t)count;
    text_at++;
    press_ctrl_c();
    errno = EINTR;
    return -1;
}

static FILE *fuzz_fopen(const char *path) {
    if (!strcmp(path, "text"))
        return text_stream;
    errno = ENOENT;
    return NULL;
}

// The C library's memory for a line stays. run.c gets a copy of exactly the line.
static ssize_t fuzz_getline(char **line, FILE *file) {
    static char *kept;
    static size_t capacity;
    ssize_t n = getline(&kept, &capacity, file);
    if (n < 0)
        return n;
    int error = errno;
    fuzz_free(*line);
    *line = take_memory((size_t)n + 1);
    if (!*line)
        return -1;
    memcpy(*line, kept, (size_t)n + 1);
    errno = error;
    return n;
}

static bool on_terminal;
static const char *environment[2]; // NAME=VALUE
static long clock_ticks;
static long ticks_to_interrupt; // Ctrl-C when the output has been flushed this many times; 0: never

static int fuzz_fflush(FILE *file) {
    if (file == stdout && ticks_to_interrupt && --ticks_to_interrupt == 0)
        press_ctrl_c();
    return fflush(file);
}

static int fuzz_clock(struct timespec *now) {
    clock_ticks++;
    *now = (struct timespec){clock_ticks / 1000, clock_ticks % 1000 * 1000000};
    return 0;
}

static const char *fuzz_getenv(const char *name) {
    size_t n = strlen(name);
    for (size_t i = 0; i < 2; i++)
        if (environment[i] && !strncmp(environment[i], name, n) && environment[i][n] == '=')
            return environment[i] + n + 1;
    return NULL;
}

// ---- The end of an execution

static jmp_buf end_of_execution;
enum { RETURNED = -1 };
static int end_status; // of exit, or RETURNED

static _Noreturn void fuzz_exit(int status) {
    end_status = status;
    longjmp(end_of_execution, 1);
}

#define main run_main
#define exit(status) fuzz_exit(status)
#define _exit(status) fuzz_exit(status)
#define posix_memalign(memory, alignment, size) fuzz_posix_memalign(memory, size)
#define realloc(old, size) fuzz_realloc(old, size)
#define free(block) fuzz_free(block)
#define open(path, flags) fuzz_open(path)
#define fstat(fd, st) fuzz_fstat(fd, st)
#define pread(fd, to, n, offset) fuzz_pread(fd, to, n)
#define mmap(address, size, protection, flags, fd, offset) fuzz_mmap(size, fd)
#define munmap(block, size) fuzz_free(block)
#define close(fd) ((void)(fd))
#define access(path, mode) (fuzz_open(path) < 0)
#define realpath(path, target) fuzz_realpath(path, target)
#define fopen(path, mode) fuzz_fopen(path)
#define fclose(file) ((void)(file))
#define fileno(file) 0
#define getline(line, capacity, file) ((void)(capacity), fuzz_getline(line, file))
#define fflush(file) fuzz_fflush(file)
#define isatty(fd) ((void)(fd), on_terminal)
#define ioctl(fd, request, size) ((void)(size), -1)
#define clock_gettime(clock, now) fuzz_clock(now)
#define getenv(name) fuzz_getenv(name)
#define sigaction(number, action, old) ((void)(action))
#define write(fd, bytes, n) ((ssize_t)(n))
#include "../run.c"
#undef main
#undef exit
#undef fopen
#undef fclose
#undef free
#undef fflush
#undef getenv

static const unsigned char *input;
static size_t input_size;

// Runs one target. What exit() leaves behind on the stack is given up, and so is all memory.
static void execute(void (*body)(void)) {
    captured_out.n = captured_err.n = 0;
    text_at = 0;
    clock_ticks = 0;
    interrupts = 0;
    n_ctrl_c = 0;
    end_status = RETURNED;
    if (!setjmp(end_of_execution))
        body();
    fflush(stdout);
    for (size_t i = 0; i < 2; i++) {
        FILE *stream = i ? text_stream : stdin;
        clearerr(stream);
        __fpurge(stream);
    }
}

// ---- What an execution may print

// One line on standard error for an error.
static void check_end(bool notes) {
    Captured *err = &captured_err;
    size_t lines = 0;
    for (size_t i = 0; i < err->n; i++)
        lines += err->bytes[i] == '\n';
    if (end_status == EXIT_INTERRUPTED)
        return;
    if (end_status > EXIT_USAGE)
        FINDING("status %d", end_status);
    if (end_status > 0 && !notes && (lines != 1 || memcmp(err->bytes, "run: ", 5) || err->bytes[err->n - 1] != '\n'))
        FINDING("not one line of error: %.*s", (int)err->n, (const char *)err->bytes);
    if (end_status == EXIT_USAGE && captured_out.n)
        FINDING("output in spite of wrong usage");
}

// Returns the end of a JSON value that starts at `at`, or NULL if it is none.
static const unsigned char *json_value(const unsigned char *at) {
    if (*at == '{' || *at == '[') {
        unsigned char close = *at == '{' ? '}' : ']', open = *at++;
        while (*at != close) {
            if (open == '{') {
                at = *at == '"' ? json_value(at) : NULL;
                if (!at || *at++ != ':')
                    return NULL;
                at += *at == ' ';
            }
            at = json_value(at);
            if (!at || (*at != ',' && *at != close))
                return NULL;
            if (*at == ',')
                at += 2; // ", "
        }
        return at + 1;
    }
    if (*at == '"') {
        for (at++; *at != '"'; at++) {
            if (*at < ' ')
                return NULL;
            at += *at == '\\';
        }
        return at + 1;
    }
    const unsigned char *start = at + (*at == '-');
    at = start;
    while ((*at >= '0' && *at <= '9') || (at > start && (*at == '.' || *at == 'e' || *at == '+' || *at == '-')))
        at++;
    return at > start ? at : NULL;
}

// The length of one of run.c's own colour sequences, 0 if there is none here.
static size_t colour_length(const unsigned char *at) {
    size_t n = 7;
    if (!strncmp((const char *)at, "\x1b[0m", 4))
        return 4;
    if (strncmp((const char *)at, "\x1b[38;5;", n))
        return 0;
    while (at[n] >= '0' && at[n] <= '9')
        n++;
    return at[n] == 'm' ? n + 1 : 0;
}

static void check_output(bool json, bool colours) {
    Captured *out = &captured_out;
    if (out->n == sizeof out->bytes) // cut off
        return;
    out->bytes[out->n] = 0;
    if (!is_utf8((Span){out->bytes, out->n}) && (json || on_terminal))
        FINDING("the output is not UTF-8");
    for (size_t at = 0; at < out->n && on_terminal && !json;) {
        uint32_t codepoint;
        size_t n = colours ? colour_length(out->bytes + at) : 0;
        if (n) {
            at += n;
            continue;
        }
        at += next_char((Span){out->bytes + at, out->n - at}, &codepoint);
        if ((codepoint < ' ' && codepoint != '\n' && codepoint != '\t') || (codepoint >= 0x7f && codepoint < 0xa0))
            FINDING("control character U+%04X for the terminal at byte %zu", codepoint, at);
    }
    for (const unsigned char *at = out->bytes; json && at < out->bytes + out->n; at++) {
        const unsigned char *end = json_value(at);
        if (!end || *end != '\n')
            FINDING("no JSON: %s", (const char *)at);
        at = end;
    }
}

// No text becomes a control token; bos may stand in front of all.
static void check_no_control(const Tokenizer *t, Tokens tokens) {
    for (size_t i = t->h.flags & ADD_BOS ? 1 : 0; i < tokens.n; i++)
        if (t->pieces[tokens.data[i]].type == CONTROL)
            FINDING("a text has become the control token %u", tokens.data[i]);
}

static void check_tokens(const Tokenizer *t, Tokens tokens) {
    for (size_t i = 0; i < tokens.n; i++)
        if (tokens.data[i] >= t->h.vocab_size)
            FINDING("token %u of %u", tokens.data[i], t->h.vocab_size);
}

// ---- What the targets share

typedef struct {
    unsigned char *bytes;
    size_t size;
} Blob;

// A file of the repository, in memory that is never given back.
static Blob load_file(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file)
        FINDING("%s: cannot read: run this at the top of the repository", path);
    Blob blob = {malloc(1 << 20), 0};
    blob.size = fread(blob.bytes, 1, 1 << 20, file);
    fclose(file);
    return blob;
}

static const void *own_block(const void *array, size_t count, size_t size) {
    void *block = allocate(count, size, "a copy");
    if (count)
        memcpy(block, array, count * size);
    return block;
}

// Gives each array of a tokenizer a block of memory of its own: then AddressSanitizer sees what reads past its end.
static void separate_arrays(Tokenizer *t) {
    const TokenizerHeader *h = &t->h;
    t->byte_id = own_block(t->byte_id, 256, sizeof *t->byte_id);
    t->longest = own_block(t->longest, 256, sizeof *t->longest);
    t->pieces = own_block(t->pieces, h->vocab_size, sizeof *t->pieces);
    t->by_text = own_block(t->by_text, h->n_by_text, sizeof *t->by_text);
    t->merges = own_block(t->merges, h->n_merges, sizeof *t->merges);
    t->transitions = own_block(t->transitions, (size_t)h->n_states * h->n_classes, sizeof *t->transitions);
    t->items = own_block(t->items, h->template_ends[N_TEMPLATES - 1], sizeof *t->items);
    t->class_block = own_block(t->class_block, h->n_classes ? N_PAGES : 0, sizeof *t->class_block);
    t->classes = own_block(t->classes, h->n_class_blocks, 256);
    t->text = own_block(t->text, h->n_text, 1);
}

#define CORPUS "tests/corpus/"
enum { TOKENIZERS = 7, FIRST_OF_CHAT = 4 };
static const char *const tokenizer_paths[TOKENIZERS] = {
    "tokenizer.bin",
    "models/stories.tokenizer.bin",
    CORPUS "tokenizer/seed-byte-level",
    CORPUS "tokenizer/seed-sentencepiece",
    CORPUS "tokenizer/seed-chat", // the vocabulary of weights/seed-vector, with different templates
    CORPUS "tokenizer/seed-chat-thinks",
    CORPUS "tokenizer/seed-chat-bare",
};
static Blob tokenizer_blobs[TOKENIZERS];
static Blob damaged_blob; // what mutate_weights begins with
static Blob model_blob;   // of cli and chat: sizes of whole vectors and one head, as those take the least time
static Tokenizer *tokenizers[TOKENIZERS], saved[TOKENIZERS];
static Model model;

static void open_all(void) {
    damaged_blob = load_file(CORPUS "weights/seed-chat");
    model_blob = load_file(CORPUS "weights/seed-vector");
    fuzz_files[0] = (FuzzFile){"m.bin", model_blob.bytes, model_blob.size};
    model = open_model("m.bin");
    for (size_t i = 0; i < TOKENIZERS; i++) {
        tokenizer_blobs[i] = load_file(tokenizer_paths[i]);
        fuzz_files[1] = (FuzzFile){tokenizer_paths[i], tokenizer_blobs[i].bytes, tokenizer_blobs[i].size};
        tokenizers[i] = open_tokenizer(tokenizer_paths[i]);
        separate_arrays(tokenizers[i]);
        saved[i] = *tokenizers[i];
    }
}

// A tokenizer as it was when it was opened: its arrays have gone with the last execution.
static Tokenizer *tokenizer_again(size_t i) {
    Tokenizer *t = tokenizers[i];
    t->h = saved[i].h;
    t->prefix = false;
    t->prompt = t->normalised = (Bytes){0};
    memset(&t->states, 0, sizeof t->states);
    memset(&t->symbols, 0, sizeof t->symbols);
    t->pairs = (Heap){0};
    return t;
}

// ---- weights

static void weights_target(void) {
    fuzz_files[0] = (FuzzFile){"m.bin", input, input_size};
    Model m = open_model("m.bin");
    uint64_t random = m.h.vocab_hash;
    uint32_t tokens[30];
    size_t V = m.h.vocab_size, context = min(m.h.max_seq_len, 70);
    size_t n = min(context, random >> 60 ? 1 + (size_t)random % 5 : 30); // seldom a large batch
    for (size_t i = 0; i < n; i++)
        tokens[i] = (uint32_t)(random_f64(&random) * (double)V);
    // one batch, and token by token: the same logits, bit for bit
    RunState batch = alloc_run_state(&m, context, n, 1 + (size_t)random % 3);
    RunState single = alloc_run_state(&m, context, 1, 1);
    n = min(n, batch.batch);
    forward_parallel(&m, &batch, tokens, n, 0, n);
    for (size_t i = 0; i < n; i++) {
        forward_parallel(&m, &single, tokens + i, 1, i, 1);
        if (memcmp(single.logits, batch.logits + i * V, V * sizeof *single.logits))
            FINDING("the logits of token %zu differ", i);
    }
    forward_parallel(&m, &single, tokens, 1, context - 1, 1); // the last position
    Sampler sampler = {.temperature = (float)(random >> 8 & 3) / 2, .top_p = (float)(random >> 10 & 7) / 8};
    sampler.top_k = random >> 16 & 7;
    sampler.random = random;
    sampler.probabilities = allocate(V, sizeof *sampler.probabilities, "sampling");
    for (size_t i = 0; i < n; i++)
        if (sample(&sampler, batch.logits + i * V, V) >= V)
            FINDING("a sampled token is not in the vocabulary");
}

// ---- tokenizer

// A conversation of two turns, without a model.
static void render_two_turns(Tokenizer *t, bool system, bool no_think) {
    Options o = {.system = system ? " You are kind.\n" : NULL, .no_think = no_think};
    Chat conversation = {0};
    Session s = {.options = &o, .tokenizer = t, .chat = &conversation};
    for (size_t i = 0; i < 2; i++) {
        Turn turn = {0};
        append_bytes(&turn.user, span_of(" hello <think> the cat\n"));
        for (uint32_t id = 0; id < t->h.vocab_size && id < 40; id++)
            push(&turn.assistant, t->h.vocab_size - 1 - id);
        push(&conversation.turns, turn);
        render_chat(&s, 0);
        check_tokens(t, s.context.tokens);
    }
    render_chat(&s, 1);
    check_tokens(t, s.context.tokens);
}

static void tokenizer_target(void) {
    fuzz_files[0] = (FuzzFile){"t.bin", input, input_size};
    Tokenizer *t = open_tokenizer("t.bin");
    separate_arrays(t);
    Tokens tokens = {0};
    Span texts[] = {span_of("the cat <think>  h\xc3\xa9\xe2\x96\x81\xff</think> <s>1234"),
                    {t->text, t->h.n_text},
                    {input, input_size}};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        texts[i].n = min(texts[i].n, 100);
        encode(t, &tokens, texts[i]);
    }
    check_tokens(t, tokens);
    for (uint32_t id = 0; id < t->h.vocab_size; id++)
        for (size_t pos = 0; pos < 3; pos++) {
            Span text = decode(t, id, pos);
            if (text.n)
                print_text(text, (Style)(pos + 1));
            is_stop(t, id);
        }
    render_two_turns(t, t->h.template_flags & HAS_SYSTEM, t->h.template_flags & HAS_NO_THINK);
}

// ---- text

// The bytes of all tokens are the text again, if the vocabulary has all bytes. SentencePiece's "▁" becomes a space.
static void check_decoded(const Tokenizer *t, Tokens tokens, Span text) {
    Bytes decoded = {0}, expected = {0};
    for (size_t i = 0; i < tokens.n; i++)
        append_bytes(&decoded, decode(t, tokens.data[i], i));
    for (size_t at = 0; at < text.n; at++) {
        bool space = t->h.kind == SENTENCEPIECE_BPE && text.n - at >= 3 && !memcmp(text.bytes + at, "\xe2\x96\x81", 3);
        push(&expected, space ? ' ' : text.bytes[at]);
        at += space ? 2 : 0;
    }
    if (decoded.n != expected.n || (decoded.n && memcmp(decoded.data, expected.data, decoded.n)))
        FINDING("%zu bytes became %zu", expected.n, decoded.n);
}

// The first byte chooses the tokenizer.
static void text_target(void) {
    if (input_size == 0)
        return;
    size_t which = *input % TOKENIZERS;
    Tokenizer *t = tokenizer_again(which);
    Tokens tokens = {0};
    Span text = {input + 1, input_size - 1};
    encode(t, &tokens, text);
    check_tokens(t, tokens);
    if (which < FIRST_OF_CHAT) // the others lack bytes
        check_decoded(t, tokens, text);
    size_t n = tokens.n;
    encode(t, &tokens, text); // once more behind the first
    check_tokens(t, tokens);
    check_no_control(t, tokens);
    stream_text(&(Printer){.terminal = true}, text, 0, true);
    for (size_t i = 0; i < n; i++)
        is_utf8(decode(t, tokens.data[i], i + 1));
}

// ---- cli

static char arguments[4096];
static char *cli_argv[66];
static int cli_argc;
static Options cli_options; // all 0 after --help, --version and wrong usage

static void cli_body(void) {
    cli_options = (Options){0};
    cli_options = parse_options(cli_argc, cli_argv);
    run_main(cli_argc, cli_argv);
}

// Splits the input into arguments at newlines. The first ones may be COLUMNS=... and NO_COLOR=... The last one is the
// text that -f reads.
static void cli_target(void) {
    size_t n = min(input_size, sizeof arguments - 1), variables = 0;
    memcpy(arguments, input, n);
    arguments[n] = 0;
    cli_argc = 0;
    cli_argv[cli_argc++] = arguments + n; // the name of the program: ""
    on_terminal = n && arguments[0] == 't';
    char *rest = arguments + (n && (arguments[0] == 't' || arguments[0] == 'p'));
    environment[0] = environment[1] = NULL;
    for (char *word = strsep(&rest, "\n"); word && cli_argc < 65; word = strsep(&rest, "\n"))
        if (variables < 2 && cli_argc == 1 && (!strncmp(word, "COLUMNS=", 8) || !strncmp(word, "NO_COLOR=", 9)))
            environment[variables++] = word;
        else
            cli_argv[cli_argc++] = word;
    cli_argv[cli_argc] = NULL;
    text_bytes = (const unsigned char *)cli_argv[cli_argc - 1];
    text_size = strlen(cli_argv[cli_argc - 1]);
    fuzz_files[0] = (FuzzFile){"m.bin", model_blob.bytes, model_blob.size};
    fuzz_files[1] = (FuzzFile){"m.tokenizer.bin", tokenizer_blobs[4].bytes, tokenizer_blobs[4].size};
    fuzz_files[2] = (FuzzFile){"tokenizer.bin", tokenizer_blobs[5].bytes, tokenizer_blobs[5].size};
    fuzz_files[3] = (FuzzFile){DEFAULT_MODEL, model_blob.bytes, model_blob.size};
    execute(cli_body);
    const Options *o = &cli_options;
    bool is_chat = o->mode && !strcmp(o->mode, "chat");
    check_end(is_chat || (o->mode && on_terminal)); // these print notes, too
    if (end_status == 0 && o->mode)
        check_output(o->json, o->probs);
    on_terminal = false;
}

// ---- chat

// Bytes 0 to 5 of the input choose the tokenizer and its flags, template_flags, the flags of the command line, when
// Ctrl-C is pressed, and the seed. The rest are the messages.
enum { CHAT_BYTES = 8 };
static Options chat_options;
static bool without_draft;
static Captured first_out;

// The KV cache has the keys and values that the tokens have in one batch, with an empty cache.
static void check_kv_cache(const Session *s) {
    const Model *m = &s->model;
    const Context *c = &s->context;
    if (c->n_past > c->tokens.n)
        FINDING("more tokens in the KV cache than in the text");
    if (c->n_past == 0)
        return;
    RunState fresh = alloc_run_state(m, c->max_tokens, 1, 1);
    forward_parallel(m, &fresh, c->tokens.data, c->n_past, 0, 1);
    for (size_t pos = 0; pos < c->n_past; pos++)
        for (size_t i = 0; i < m->h.head_dim; i++) // the model has one layer and one kv head
            if (float_bits(cached_k(m, &fresh, 0, 0, pos, i)) != float_bits(cached_k(m, &s->run, 0, 0, pos, i)) ||
                float_bits(cached_v(m, &fresh, 0, 0, pos, i)) != float_bits(cached_v(m, &s->run, 0, 0, pos, i)))
                FINDING("the KV cache is wrong at position %zu of %zu", pos, c->n_past);
}

static void chat_body(void) {
    size_t which = FIRST_OF_CHAT + input[0] % (TOKENIZERS - FIRST_OF_CHAT);
    Tokenizer *t = tokenizer_again(which);
    uint32_t extra = input[1] | (uint32_t)input[2] << 8;
    t->h.template_flags ^= (extra & ALL_TEMPLATE_FLAGS) & ~(uint32_t)HAS_TEMPLATE;
    uint8_t flags = input[3], more = input[4];
    chat_options = (Options){.model = "m.bin", .mode = "chat", .top_p = 0.9f, .threads = 1, .seed = input[6]};
    Options *o = &chat_options;
    o->temperature = flags & 1 ? 0 : 1;
    o->json = flags & 2;
    o->probs = flags & 4;
    o->draft = flags & 8 && !without_draft ? 3 : 0;
    o->system = flags & 16 && t->h.template_flags & HAS_SYSTEM ? " be kind <s>\n" : NULL;
    o->no_think = flags & 32 && t->h.template_flags & HAS_NO_THINK;
    o->prompt = flags & 64 ? "he <think>" : NULL;
    o->steps = more & 7;
    o->top_k = more >> 3 & 3;
    size_t longest = model.h.max_seq_len;
    Session s = {.options = o, .printer = new_printer(o), .model = model, .tokenizer = t};
    s.context.max_tokens = more & 32 ? longest : more & 64 ? 4 : 12;
    chat(&s);
    check_tokens(t, s.context.tokens);
    check_kv_cache(&s);
    flush_output();
}

static void chat_once(bool draft) {
    without_draft = !draft;
    ticks_to_interrupt = input[5] % 32;
    execute(chat_body);
    check_end(true);
    if (end_status <= 0)
        check_output(chat_options.json, chat_options.probs);
}

static void chat_target(void) {
    if (input_size < CHAT_BYTES)
        return;
    text_bytes = input + CHAT_BYTES;
    text_size = input_size - CHAT_BYTES;
    on_terminal = input[3] & 128;
    has_ctrl_c = true;
    environment[0] = environment[1] = NULL;
    chat_once(true);
    // The same without guesses. After a Ctrl-C, other tokens are cached, and --json prints how many.
    if (input[3] & 8 && end_status == RETURNED && n_ctrl_c == 0) {
        memcpy(first_out.bytes, captured_out.bytes, captured_out.n);
        first_out.n = captured_out.n;
        forget_memory();
        chat_once(false);
        if (first_out.n != captured_out.n || memcmp(first_out.bytes, captured_out.bytes, first_out.n))
            FINDING("--draft has changed the text: %.*s", (int)first_out.n, (const char *)first_out.bytes);
    }
    on_terminal = false;
    ticks_to_interrupt = 0;
}

// ---- Mutation

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

static uint64_t dice;
static size_t roll(size_t n) { return (size_t)(random_f64(&dice) * (double)n); }

static uint32_t bounds[6]; // that numbers in this file must not reach

static uint32_t odd_number(uint32_t old) {
    static const uint32_t odd[] = {
        0,   1,   2,    3,     4,       7,       8,          15,         16,         63,         64,         65,    127,
        255, 256, 4095, 65535, 1 << 20, 1 << 24, 0x7f800000, 0x7fc00000, 0x7fffffff, 0x80000000, 0xffffffff, 0x3f80};
    switch (roll(5)) {
    case 0: return odd[roll(sizeof odd / sizeof *odd)];
    case 1: return old + 1 - 2 * (uint32_t)roll(2);
    case 2: return (uint32_t)roll(40);
    case 3: return bounds[roll(6)] - (uint32_t)roll(2);
    default: return old ^ 1u << roll(32);
    }
}

static void damage_word(uint8_t *data, size_t n_words) {
    uint32_t word;
    uint8_t *at = data + 4 * roll(n_words);
    memcpy(&word, at, sizeof word);
    word = odd_number(word);
    memcpy(at, &word, sizeof word);
}

// The size of a weights file by its header, far too large if it has an impossible one.
static double weights_size(const Header *h) {
    double D = h->dim, F = h->hidden_dim, V = h->vocab_size, d = h->head_dim, Q = d * h->n_heads;
    double width = Q + 2 * d * h->n_kv_heads, size = HEADER_SPACE;
    double tensors[] = {D,
                        width * D,
                        h->flags & QKV_BIAS ? width : 0,
                        h->flags & QK_NORM ? d : 0,
                        h->flags & QK_NORM ? d : 0,
                        D * Q,
                        D,
                        2 * F * D,
                        D * F};
    double embedding = ceil(V * D / 32) * 64, layer = 0;
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
        layer += ceil(tensors[i] / 32) * 64;
    double last = h->flags & TIED ? D * 2 : ceil(D / 32) * 64 + V * D * 2;
    return size + embedding + h->n_layers * layer + last;
}

// Gives a weights file the size that its header asks for. If this is too much, makes the header ask for less.
static size_t mend_weights(uint8_t *data, size_t size, size_t max_size) {
    Header *h = (Header *)data;
    memcpy(h->magic, "twofiles", 8);
    h->version = 1;
    uint32_t *sizes[] = {&h->dim,        &h->hidden_dim, &h->n_layers,  &h->n_heads,
                         &h->n_kv_heads, &h->head_dim,   &h->vocab_size};
    for (size_t i = 0; i < 300 && weights_size(h) > (double)max_size; i++) {
        uint32_t **largest = sizes;
        for (uint32_t **at = sizes; at < sizes + 7; at++)
            largest = **at > **largest ? at : largest;
        **largest = **largest / 2 + 1;
    }
    if (roll(4)) {
        if (h->n_kv_heads == 0 || h->n_heads % h->n_kv_heads)
            h->n_kv_heads = 1;
        h->head_dim &= ~1u;
        h->max_seq_len = h->max_seq_len ? h->max_seq_len : 9;
    }
    double wanted = weights_size(h);
    if (wanted > (double)max_size)
        return size;
    for (; size < (size_t)wanted; size++) // more of the weights that are there
        data[size] = size < HEADER_SPACE ? 0 : data[HEADER_SPACE + (size * 7 & 0x3f)];
    h->file_size = (uint64_t)wanted;
    return (size_t)wanted;
}

static size_t mutate_weights(uint8_t *data, size_t size, size_t max_size) {
    static const uint16_t numbers[] = {0,      0x8000, 1,      0x3c00, 0x3f80, 0x7bff, 0x7c00,
                                       0x7e00, 0x7f7f, 0x7f80, 0x7fc0, 0xfbff, 0xff7f};
    if (max_size < damaged_blob.size)
        return size;
    if (size < HEADER_SPACE + 64) { // begins with a good file
        size = damaged_blob.size;
        memcpy(data, damaged_blob.bytes, size);
    }
    switch (roll(8)) {
    case 0:
    case 1:
    case 2: damage_word(data + 8, (sizeof(Header) - 8) / 4); break;
    case 3: LLVMFuzzerMutate(data, sizeof(Header), sizeof(Header)); break;
    case 4: data[sizeof(Header) + roll(HEADER_SPACE - sizeof(Header))] ^= (uint8_t)(roll(16) == 0); break;
    case 5:
        size = HEADER_SPACE + LLVMFuzzerMutate(data + HEADER_SPACE, size - HEADER_SPACE, max_size - HEADER_SPACE);
        break;
    default:
        for (size_t i = 0, n = 1 + roll(3); i < n; i++)
            memcpy(data + (HEADER_SPACE + roll(size - HEADER_SPACE)) / 2 * 2, &numbers[roll(13)], 2);
    }
    return roll(16) ? mend_weights(data, size, max_size) : size;
}

// The arrays of a tokenizer file, as models/FORMAT.md lists them.
enum { PIECES = 2, BY_TEXT, MERGES, TRANSITIONS, ITEMS, CLASS_BLOCK, CLASSES, TEXT_BYTES, ARRAYS };

static void array_sizes(const TokenizerHeader *h, double sizes[ARRAYS]) {
    double all[ARRAYS] = {1024,
                          1024,
                          16.0 * h->vocab_size,
                          4.0 * h->n_by_text,
                          16.0 * h->n_merges,
                          4.0 * h->n_states * h->n_classes,
                          12.0 * h->template_ends[N_TEMPLATES - 1],
                          h->n_classes ? 4.0 * N_PAGES : 0,
                          256.0 * h->n_class_blocks,
                          4 * ceil(h->n_text / 4.0)};
    memcpy(sizes, all, sizeof all);
}

static double sum_of(const double *sizes, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += sizes[i];
    return sum;
}

static const uint8_t *sorted_file; // for order_texts
static int order_texts(const void *a, const void *b) {
    const TokenizerHeader *h = (const TokenizerHeader *)sorted_file;
    double sizes[ARRAYS];
    array_sizes(h, sizes);
    const Piece *pieces = (const Piece *)(sorted_file + sizeof *h + 2048);
    const uint8_t *text = sorted_file + sizeof *h + (size_t)sum_of(sizes, TEXT_BYTES);
    Span spans[2];
    for (size_t i = 0; i < 2; i++) {
        uint32_t id = *(const uint32_t *)(i ? b : a);
        bool good = id < h->vocab_size && pieces[id].offset <= h->n_text;
        spans[i] = (Span){good ? text + pieces[id].offset : text, 0};
        if (good)
            spans[i].n = min(pieces[id].length, h->n_text - pieces[id].offset);
    }
    return compare(spans[0], spans[1]);
}

// The hash and the size that belong to what the file holds now; some of the times also the order of sorted arrays.
static void mend_tokenizer(uint8_t *data, size_t size) {
    TokenizerHeader *h = (TokenizerHeader *)data;
    double sizes[ARRAYS];
    memcpy(h->magic, "twotoken", 8);
    h->version = 3;
    array_sizes(h, sizes);
    if (roll(2) && (double)size == sizeof *h + sum_of(sizes, ARRAYS)) {
        sorted_file = data;
        uint8_t *by_text = data + sizeof *h + (size_t)sum_of(sizes, BY_TEXT);
        uint8_t *merges = data + sizeof *h + (size_t)sum_of(sizes, MERGES);
        qsort(by_text, h->n_by_text, 4, order_texts);
        qsort(merges, h->n_merges, 16, compare_merges);
    }
    h->file_size = size;
    h->hash = hash_of(data + 24, size - 24);
}

static uint8_t other[1 << 16];

// Changes the length of an array by some elements, and its number in the header accordingly.
static size_t resize_array(uint8_t *data, size_t size, size_t max_size) {
    TokenizerHeader *h = (TokenizerHeader *)data, old = *h;
    double before[ARRAYS], after[ARRAYS];
    uint32_t *lengths[] = {&h->vocab_size, &h->n_by_text,      &h->n_merges, &h->n_states,
                           &h->n_classes,  &h->n_class_blocks, &h->n_text,   NULL};
    uint32_t *length = lengths[roll(8)], change = (uint32_t)roll(3) + 1;
    if (length && roll(2))
        *length += change;
    else if (length)
        *length -= min(change, *length);
    else
        for (size_t i = roll(N_TEMPLATES); i < N_TEMPLATES; i++) // a template gets more items
            h->template_ends[i] += change;
    array_sizes(&old, before);
    array_sizes(h, after);
    double wanted = sizeof *h + sum_of(after, ARRAYS);
    if ((double)size != sizeof *h + sum_of(before, ARRAYS) || wanted > (double)min(max_size, sizeof other)) {
        *h = old;
        return size;
    }
    memset(other, 0, (size_t)wanted);
    memcpy(other, h, sizeof *h);
    size_t from_at = sizeof *h, to = sizeof *h;
    for (size_t i = 0; i < ARRAYS; i++) {
        size_t n = (size_t)before[i], m = (size_t)after[i];
        memcpy(other + to, data + from_at, min(n, m));
        for (size_t at = n; at < m && n >= 16; at++) // more of the same
            other[to + at] = other[to + at - 16];
        from_at += n;
        to += m;
    }
    memcpy(data, other, (size_t)wanted);
    return (size_t)wanted;
}

static size_t mutate_tokenizer(uint8_t *data, size_t size, size_t max_size) {
    if (size < sizeof(TokenizerHeader) + 2048 + 16) {
        const Blob *good = &tokenizer_blobs[2 + roll(TOKENIZERS - 2)];
        if (good->size > max_size)
            return size;
        size = good->size;
        memcpy(data, good->bytes, size);
    }
    double sizes[ARRAYS];
    const TokenizerHeader *h = (TokenizerHeader *)data;
    array_sizes(h, sizes);
    uint32_t all[] = {h->vocab_size, 2 * h->n_states, h->n_classes, h->n_class_blocks, h->n_text, h->n_by_text};
    memcpy(bounds, all, sizeof bounds);
    size_t array = roll(ARRAYS), start = sizeof(TokenizerHeader);
    switch (roll(6)) {
    case 0: damage_word(data + 40, (sizeof(TokenizerHeader) - 40) / 4); break;
    case 1: size = resize_array(data, size, max_size); break;
    case 2: LLVMFuzzerMutate(data + start, size - start, size - start); break;
    default: // a word, or some bytes, of any array
        if (sum_of(sizes, array + 1) + (double)start > (double)size || sizes[array] < 4)
            break;
        start += (size_t)sum_of(sizes, array);
        if (array == CLASS_BLOCK && roll(2))
            damage_word(data + start, 1); // the block of ASCII, which the texts have
        else if (roll(3))
            damage_word(data + start, (size_t)sizes[array] / 4);
        else
            LLVMFuzzerMutate(data + start, (size_t)sizes[array], (size_t)sizes[array]);
    }
    size = size / 4 * 4;
    if (roll(32))
        mend_tokenizer(data, size);
    return size;
}

// Inserts a word, or replaces what is there.
static size_t put_word(uint8_t *data, size_t size, size_t max_size, size_t at, size_t removed, Span word) {
    removed = min(removed, size - at);
    if (size - removed + word.n > max_size)
        return size;
    memmove(data + at + word.n, data + at + removed, size - at - removed);
    if (word.n)
        memcpy(data + at, word.bytes, word.n);
    return size - removed + word.n;
}

// Tokens of the vocabulary come into the text as a whole.
static size_t mutate_text(uint8_t *data, size_t size, size_t max_size) {
    if (size == 0 || roll(3))
        return LLVMFuzzerMutate(data, size, max_size);
    Tokenizer *t = tokenizers[*data % TOKENIZERS];
    uint32_t id = (uint32_t)roll(roll(2) ? t->h.vocab_size : min(t->h.vocab_size, 300));
    return put_word(data, size, max_size, 1 + roll(size), roll(2) ? roll(8) : 0, piece_text(t, id));
}

static size_t mutate_cli(uint8_t *data, size_t size, size_t max_size) {
    static const char *const words[] = {"m.bin",
                                        "-m",
                                        "-i",
                                        "-f",
                                        "-y",
                                        "-c",
                                        "-j",
                                        "-z",
                                        "-n",
                                        "-t",
                                        "-p",
                                        "-k",
                                        "-s",
                                        "-h",
                                        "--help",
                                        "--probs",
                                        "--json",
                                        "--draft",
                                        "--no-think",
                                        "--stride",
                                        "--version",
                                        "--prefill",
                                        "--decode",
                                        "--repeat",
                                        "generate",
                                        "chat",
                                        "next",
                                        "perplexity",
                                        "tokenize",
                                        "bench",
                                        "text",
                                        "-",
                                        "0",
                                        "1",
                                        "2",
                                        "3",
                                        "7",
                                        "24",
                                        "25",
                                        "1e-30",
                                        "0.5",
                                        "nan",
                                        "inf",
                                        "-1",
                                        "15",
                                        "2147483647",
                                        "9223372036854775807",
                                        "he the <think> he the",
                                        "a",
                                        "",
                                        "COLUMNS=40",
                                        "NO_COLOR=1",
                                        "t",
                                        "p",
                                        "m.tokenizer.bin",
                                        "tokenizer.bin",
                                        "0x10",
                                        "1.0",
                                        "100"};
    if (roll(4) == 0)
        return LLVMFuzzerMutate(data, size, max_size);
    // the start of an argument, and its length with the newline
    size_t at = size ? roll(size) : 0, n = 0;
    while (at > 0 && data[at - 1] != '\n')
        at--;
    while (at + n < size && data[at + n] != '\n')
        n++;
    char word[64];
    int length = snprintf(word, sizeof word, "%s\n", words[roll(sizeof words / sizeof *words)]);
    size_t removed = roll(3) ? n + 1 : 0; // replaces, inserts, or removes
    return put_word(data, size, max_size, at, removed, (Span){(uint8_t *)word, roll(8) ? (size_t)length : 0});
}

static size_t mutate_chat(uint8_t *data, size_t size, size_t max_size) {
    static const char *const words[] = {"\n",       "\\\n", "\x03", "\x03\n", "<think>",
                                        "</think>", "<s>",  " ",    "he",     "\r\n"};
    if (size <= CHAT_BYTES || roll(2))
        return LLVMFuzzerMutate(data, size, max_size);
    if (roll(3) == 0) {
        LLVMFuzzerMutate(data, CHAT_BYTES, CHAT_BYTES);
        return size;
    }
    size_t at = CHAT_BYTES + roll(size - CHAT_BYTES + 1);
    return put_word(data, size, max_size, at, roll(3), span_of(words[roll(sizeof words / sizeof *words)]));
}

// ---- libFuzzer

typedef struct {
    const char *name;
    void (*run)(void); // an execution
    bool apart;        // it calls execute itself
    size_t (*mutate)(uint8_t *data, size_t size, size_t max_size);
} Target;

static const Target targets[] = {
    {"weights", weights_target, false, mutate_weights}, {"tokenizer", tokenizer_target, false, mutate_tokenizer},
    {"text", text_target, false, mutate_text},          {"cli", cli_target, true, mutate_cli},
    {"chat", chat_target, true, mutate_chat},
};
static const Target *target;

static FILE *stream_of(void *cookie, cookie_io_functions_t functions, const char *mode, int buffering) {
    FILE *stream = fopencookie(cookie, mode, functions);
    setvbuf(stream, NULL, buffering, 4096);
    return stream;
}

// Leaks are no matter, as memory comes from the arena; and what is freed apart from that need not be kept for long.
const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "detect_leaks=0:quarantine_size_mb=1"; }

// The name of the target is the first argument; the processes that libFuzzer starts find it in the environment.
int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv) {
    if (*argc > 1 && *(*argv)[1] != '-') {
        setenv("FUZZ_TARGET", (*argv)[1], 1);
        (*argv)[1] = (*argv)[0];
        (*argv)++;
        (*argc)--;
    }
    const char *name = getenv("FUZZ_TARGET");
    for (size_t i = 0; i < sizeof targets / sizeof *targets; i++)
        if (name && !strcmp(name, targets[i].name))
            target = &targets[i];
    if (!target)
        FINDING("expected weights, tokenizer, text, cli or chat, found %s", name ? name : "nothing");
    arena = aligned_alloc(4096, ARENA_BYTES);
    __asan_poison_memory_region(arena, ARENA_BYTES);
    stdout = stream_of(&captured_out, (cookie_io_functions_t){.write = capture}, "w", _IOFBF);
    stderr = stream_of(&captured_err, (cookie_io_functions_t){.write = capture}, "w", _IONBF);
    stdin = stream_of(NULL, (cookie_io_functions_t){.read = read_text}, "r", _IOFBF);
    text_stream = stream_of(NULL, (cookie_io_functions_t){.read = read_text}, "r", _IOFBF);
    execute(open_all);
    if (end_status != RETURNED)
        FINDING("%.*s", (int)captured_err.n, (const char *)captured_err.bytes);
    arena_kept = arena_used;
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input = data;
    input_size = size;
    if (target->apart) {
        target->run();
    } else {
        execute(target->run);
        check_end(false);
    }
    forget_memory();
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned int seed) {
    dice = seed;
    return target->mutate(data, size, max_size);
}
