/* run.c: a large language model is two files, the weights and this program that runs them.
 *
 * It maps a weights file of 2 bytes a parameter, feeds tokens through the Transformer with the loops
 * below, and samples the next token, again and again. It runs any model of the Llama family that
 * export.py has converted, and knows none by name. It does not train and does not quantise. It needs
 * libc and libm; with OpenMP it uses all cores.
 *
 *   1 The model file      what is in it, and how it is mapped and checked
 *   2 Kernels             matmul, rmsnorm, rope, attention, swiglu, each once, in plain C
 *   3 The forward pass    the whole Transformer
 *   4 Sampling            from logits to the next token
 *   5 The tokenizer       from text to tokens and back
 *   6 Modes               generate, chat, next, perplexity, tokenize, bench
 *   7 The command line
 *   8 Appendix: SIMD      the inner loops, for AVX-512, AVX2, NEON; and AMX
 *   9 Appendix: paging    reading a file that is larger than memory
 *
 * Shapes are written (rows, columns), the last one contiguous, with these letters:
 *
 *   T tokens of this batch    D dim            H n_heads       d head_dim    Q = H*d
 *   C positions of context    F hidden_dim     G n_kv_heads    V vocab_size  K = G*d
 *
 * Two promises shape the code. The bits of a token's logits depend on the tokens before it alone, never
 * on the number of threads or on how a prompt was cut into batches: every sum has one fixed order.
 * And a bad file or a bad flag is one clear line on standard error, never a crash.
 */
#define _GNU_SOURCE // sched_getaffinity
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
#endif

#define VERSION "0.1.0"
#define DEFAULT_MODEL "models/stories.bin"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the files are little-endian and used as they are");

enum { CANNOT = 1, USAGE = 2, INTERRUPTED = 130 }; // exit status: a bad file or no memory; wrong usage; Ctrl-C

__attribute__((format(printf, 2, 3))) static _Noreturn void die(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    fputs("run: ", stderr);
    vfprintf(stderr, format, args);
    fputs(status == USAGE ? " (run --help shows the usage)\n" : "\n", stderr);
    va_end(args);
    exit(status);
}

#define expect(condition, ...) ((condition) ? (void)0 : die(CANNOT, __VA_ARGS__))

// Uninitialised memory, on the boundary of a cache line: a vector that straddles two costs twice.
static void *allocate(size_t count, size_t size, const char *what) {
    void *memory;
    expect(!posix_memalign(&memory, 64, count * size + 1), "no memory for %s: %.1f MB needed", what,
           (double)count * (double)size / 1e6);
    return memory;
}

static size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static size_t multiple_of(size_t step, size_t n) { return (n + step - 1) / step * step; } // rounded up

// Memory that grows with what is appended.
typedef struct {
    void *data;
    size_t n, capacity; // bytes
} Buffer;

// Room for n bytes more.
static void *reserve(Buffer *b, size_t n) {
    if (b->n + n > b->capacity) {
        b->capacity = 2 * (b->n + n);
        b->data = realloc(b->data, b->capacity);
        expect(b->data, "no memory for a text: %.1f MB needed", (double)b->capacity / 1e6);
    }
    return (char *)b->data + b->n;
}

static void append(Buffer *b, const void *data, size_t n) {
    if (n)
        memcpy(reserve(b, n), data, n);
    b->n += n;
}

static void cut_front(Buffer *b, size_t n) {
    b->n -= n;
    if (n)
        memmove(b->data, (char *)b->data + n, b->n);
}

static size_t n_tokens(Buffer tokens) { return tokens.n / sizeof(uint32_t); }

static void push_token(Buffer *tokens, uint32_t token) { append(tokens, &token, sizeof token); }

#define NONE UINT32_MAX // no token, no row, no symbol

static uint32_t last_token(Buffer tokens) { return tokens.n ? ((uint32_t *)tokens.data)[n_tokens(tokens) - 1] : NONE; }

// ------------------------------------------------------------------------------------------------
// 1 The model file

typedef enum { F32, BF16, F16 } Dtype; // how numbers are stored; in files only the 16-bit types occur

enum { TIED = 1, QKV_BIAS = 2, QK_NORM = 4, ALL_FLAGS = 7 }; // Header.flags
enum { ROPE_PLAIN, ROPE_LINEAR, ROPE_LLAMA3 };               // Header.rope_scaling
enum { HEADER_SPACE = 4096, ALIGNMENT = 64, MAX_HEAD = 1024 };

// The start of a weights file, byte for byte; zeros fill it up to HEADER_SPACE.
typedef struct {
    char magic[8]; // "twofiles"
    uint32_t version, dtype, flags;
    uint32_t dim, hidden_dim, n_layers, n_heads, n_kv_heads, head_dim, vocab_size, max_seq_len;
    float norm_eps, rope_theta;
    uint32_t rope_scaling;
    float rope_factor, rope_low_freq_factor, rope_high_freq_factor;
    uint32_t rope_original_max_seq_len;
    uint64_t file_size, vocab_hash;
} Header;
_Static_assert(sizeof(Header) == 96, "the compiler added padding to Header");

typedef struct {
    const void *data; // (rows, cols), rows `stride` elements apart
    Dtype dtype;
    size_t rows, cols, stride;
} Tensor;

typedef struct {
    Tensor attn_norm; // (D)
    Tensor wqkv;      // (Q + 2K, D)   the rows of wq, then those of wk and wv
    Tensor bqkv;      // (Q + 2K)      only with QKV_BIAS
    Tensor q_norm;    // (d)           only with QK_NORM
    Tensor k_norm;    // (d)           only with QK_NORM
    Tensor wo;        // (D, Q)
    Tensor ffn_norm;  // (D)
    Tensor w_gate_up; // (2F, D)       the rows of w_gate, then those of w_up
    Tensor w_down;    // (D, F)
} Layer;

// A file, or a part of it, and how far it has been read.
typedef struct {
    const char *path;
    const unsigned char *bytes; // (n) where it is mapped
    size_t n, at;
    int fd;
} File;

typedef struct {
    File file; // stays open
    Header h;
    size_t q_dim, kv_dim; // Q and K
    Tensor embedding;     // (V, D)
    Layer *layers;        // (n_layers)
    Tensor final_norm;    // (D)
    Tensor classifier;    // (V, D)    the embedding itself if TIED
} Model;

// Maps a file, read-only. Nothing is read yet: the kernel brings in a page when it is first touched.
static File map_file(const char *path, const char *magic, size_t min_size, const char *what) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // a pipe shall not block, it is refused below
    struct stat st;
    expect(fd >= 0 && !fstat(fd, &st), "%s: expected %s, as python3 export.py CHECKPOINT -o MODEL.bin makes it: %s",
           path, what, strerror(errno));
    expect(S_ISREG(st.st_mode), "%s: expected %s, found %s", path, what,
           S_ISDIR(st.st_mode) ? "a directory" : "no regular file");
    size_t size = (size_t)st.st_size;
    expect(size >= min_size, "%s: expected %s of at least %zu bytes, found %zu", path, what, min_size, size);
    const char *map = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
    expect(map != MAP_FAILED, "%s: cannot map %zu bytes: %s", path, size, strerror(errno));

    // Another program's file is the likeliest mistake, so show what stands where the magic should.
    char found[9] = {0};
    for (int i = 0; i < 8; i++)
        found[i] = map[i] >= ' ' && map[i] <= '~' ? map[i] : '.';
    expect(!memcmp(map, magic, 8),
           "%s: expected %s, which starts \"%s\", found \"%s\" (export.py converts other files)", path, what, magic,
           found);
    return (File){path, (const unsigned char *)map, size, 0, fd};
}

static const void *next_bytes(File *f, const char *what, size_t n) {
    expect(n <= f->n - f->at, "%s: %s: expected %zu bytes, found %zu", f->path, what, n, f->n - f->at);
    f->at += n;
    return f->bytes + f->at - n;
}

static void check(const char *path, const char *name, double value, double min, double max) {
    expect(min < max || value == min, "%s: %s: expected %.10g, found %.10g", path, name, min, value);
    expect(value >= min && value <= max, "%s: %s: expected %.10g to %.10g, found %.10g", path, name, min, max, value);
}

static void check_size(const char *path, uint64_t promised, size_t size) {
    expect(promised == size, "%s: file size: expected %llu bytes by its header, found %zu: incomplete or damaged", path,
           (unsigned long long)promised, size);
}

// Refuses nonsense, with bounds that keep every size computed from a header below 2^63.
static void check_header(const Model *m) {
    const Header *h = &m->h;
    const char *path = m->file.path;
    check(path, "version", h->version, 1, 1);
    check(path, "dtype", h->dtype, BF16, F16);
    check(path, "flags", h->flags, 0, ALL_FLAGS);
    check(path, "dim", h->dim, 1, 1 << 20);
    check(path, "hidden_dim", h->hidden_dim, 1, 1 << 22);
    check(path, "n_layers", h->n_layers, 1, 1 << 12);
    check(path, "n_heads", h->n_heads, 1, 1 << 14);
    check(path, "n_kv_heads", h->n_kv_heads, 1, h->n_heads);
    expect(h->n_heads % h->n_kv_heads == 0, "%s: n_kv_heads: expected a divisor of n_heads %u, found %u", path,
           h->n_heads, h->n_kv_heads);
    check(path, "head_dim", h->head_dim, 2, MAX_HEAD);
    expect(h->head_dim % 2 == 0, "%s: head_dim: expected an even number, found %u", path, h->head_dim);
    check(path, "vocab_size", h->vocab_size, 1, 1 << 24);
    check(path, "max_seq_len", h->max_seq_len, 1, 1 << 28);
    check(path, "norm_eps", h->norm_eps, 0, 1);
    check(path, "rope_theta", h->rope_theta, 1, FLT_MAX);
    check(path, "rope_scaling", h->rope_scaling, ROPE_PLAIN, ROPE_LLAMA3);
    if (h->rope_scaling != ROPE_PLAIN)
        check(path, "rope_factor", h->rope_factor, 1, FLT_MAX);
    if (h->rope_scaling == ROPE_LLAMA3) {
        check(path, "rope_low_freq_factor", h->rope_low_freq_factor, FLT_MIN, 1e6f);
        check(path, "rope_high_freq_factor", h->rope_high_freq_factor, h->rope_low_freq_factor * 1.001f, 1e7f);
        check(path, "rope_original_max_seq_len", h->rope_original_max_seq_len, 1, 1 << 28);
    }
    check_size(path, h->file_size, m->file.n);
    for (size_t i = sizeof *h; i < HEADER_SPACE; i++)
        check(path, "the unused bytes of the header", m->file.bytes[i], 0, 0);
}

// The next tensor of the file.
static Tensor take(Model *m, const char *name, size_t rows, size_t cols) {
    File *f = &m->file;
    size_t start = multiple_of(ALIGNMENT, f->at);
    f->at = start + rows * cols * sizeof(uint16_t);
    expect(f->at <= f->n, "%s: %s: expected bytes %zu to %zu, found only %zu", f->path, name, start, f->at, f->n);
    return (Tensor){f->bytes + start, (Dtype)m->h.dtype, rows, cols, cols};
}

static Model open_model(const char *path) {
    Model m = {.file = map_file(path, "twofiles", HEADER_SPACE, "a weights file")};
    memcpy(&m.h, next_bytes(&m.file, "header", HEADER_SPACE), sizeof m.h);
    check_header(&m);
    size_t D = m.h.dim, F = m.h.hidden_dim, V = m.h.vocab_size, d = m.h.head_dim;
    size_t Q = m.q_dim = m.h.n_heads * d;
    size_t K = m.kv_dim = m.h.n_kv_heads * d;

    // The order in the file is the order of use.
    m.embedding = take(&m, "embedding", V, D);
    m.layers = allocate(m.h.n_layers, sizeof *m.layers, "the table of layers");
    size_t bias = m.h.flags & QKV_BIAS ? Q + 2 * K : 0, norm = m.h.flags & QK_NORM ? d : 0; // 0: there is none
    for (Layer *l = m.layers; l < m.layers + m.h.n_layers; l++) {
        l->attn_norm = take(&m, "attn_norm", 1, D);
        l->wqkv = take(&m, "wqkv", Q + 2 * K, D);
        l->bqkv = take(&m, "bqkv", 1, bias);
        l->q_norm = take(&m, "q_norm", 1, norm);
        l->k_norm = take(&m, "k_norm", 1, norm);
        l->wo = take(&m, "wo", D, Q);
        l->ffn_norm = take(&m, "ffn_norm", 1, D);
        l->w_gate_up = take(&m, "w_gate_up", 2 * F, D);
        l->w_down = take(&m, "w_down", D, F);
    }
    m.final_norm = take(&m, "final_norm", 1, D);
    m.classifier = m.h.flags & TIED ? m.embedding : take(&m, "classifier", V, D);
    size_t end = m.file.at;
    expect(end == m.file.n, "%s: file size: expected %zu bytes by its dimensions, found %zu", path, end, m.file.n);
    return m;
}

// ------------------------------------------------------------------------------------------------
// 2 Kernels
//
// Each is called by all threads at once. "omp for" gives every thread its share of the loop and lets none
// go on before all are done; without OpenMP, or outside a parallel region, it is a plain loop.

enum {
    TILE_ROWS = 4,      // rows of weights that are multiplied at a time
    TILE_TOKENS = 6,    // tokens that pass each of them before the next
    BLOCK_ROWS = 128,   // rows of weights that stay in the cache while all tokens pass
    CHUNK_BYTES = 4096, // of each row of tokens, multiplied at a time
    KEYS = 64,          // keys and values that attention handles at a time
    QUERIES = 64,       // queries that pass by one block of keys
    QUERY_TILE = 4,     // queries that share each key and value loaded
    INPUT_PAD = 32,     // elements between rows of State.input, at least
    PANEL = 512,        // AMX: columns that a vector's lanes deal out among tiles,
    SQUARE = 32,        // rows and tokens that are multiplied at a time,
    TILE_BLOCK = 256,   // rows, and
    TILE_COLUMNS = 2048 // columns of them, that stay in the cache while all tokens pass
};

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float bf16_to_f32(uint16_t h) { return float_of((uint32_t)h << 16); }

// Rounds to nearest, ties to even; NaN stays NaN.
static inline uint16_t f32_to_bf16(float value) {
    uint32_t bits = bits_of(value);
    uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded >> 16);
}

// The exponent of an f16 is biased by 15, that of an f32 by 127: multiplying by 2^112 corrects it, and makes
// f16's subnormal numbers normal at the same time.
static inline float f16_to_f32(uint16_t h) {
    float magnitude = float_of((uint32_t)(h & 0x7fff) << 13) * 0x1p112f;
    uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000 : 0; // infinity or NaN
    return float_of(bits_of(magnitude) | special | (uint32_t)(h & 0x8000) << 16);
}

// Rounds to nearest, ties to even; too large becomes infinity.
static inline uint16_t f32_to_f16(float value) {
    uint32_t sign = bits_of(value) >> 16 & 0x8000;
    uint32_t bits = bits_of(value) & 0x7fffffff;
    uint32_t normal = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
    uint32_t subnormal = bits_of(float_of(bits) + 0.5f) - 0x3f000000; // the last bits of the sum, which rounds
    uint32_t half = bits < 0x38800000 ? subnormal : normal;           // below 2^-14
    half = bits >= 0x477ff000 ? 0x7c00 : half;                        // what rounds to 65,536 or more: infinity
    half = bits > 0x7f800000 ? 0x7e00 : half;                         // NaN
    return (uint16_t)(half | sign);
}

static inline size_t size_of(Dtype dtype) { return dtype == F32 ? sizeof(float) : sizeof(uint16_t); }

// Where element i of an array of any type is, and what it is.
static inline const void *address(const void *array, Dtype dtype, size_t i) {
    return (const char *)array + i * size_of(dtype);
}

static inline float element(const void *array, Dtype dtype, size_t i) {
    const void *p = address(array, dtype, i);
    return dtype == F32    ? *(const float *)p
           : dtype == BF16 ? bf16_to_f32(*(const uint16_t *)p)
                           : f16_to_f32(*(const uint16_t *)p);
}

// `rows` rows of a tensor, from row r on, and of them `cols` columns, from column c on.
static inline Tensor part(Tensor t, size_t r, size_t rows, size_t c, size_t cols) {
    return (Tensor){address(t.data, t.dtype, r * t.stride + c), t.dtype, rows, cols, t.stride};
}

// a * b + c, in one instruction where the processor has one
static inline float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// e^x for x <= 0 within 3 units in the last place, and 0 below -87. Not libm's, because compilers make vector
// code of this one: x = n ln 2 + r, e^r is a polynomial, and 2^n goes straight into the exponent's bits.
static inline float exp_negative(float x) {
    const float round = 12582912.0f; // 1.5 * 2^23: what is added to it loses its fraction
    float shifted = fused(x, 1.44269504f, round);
    float n = shifted - round;
    float r = fused(n, -1.42860677e-6f, fused(n, -0.693145752f, x)); // ln 2 in two parts: n times the first is exact
    float p = 1.0f / 720;
    p = fused(p, r, 1.0f / 120);
    p = fused(p, r, 1.0f / 24);
    p = fused(p, r, 1.0f / 6);
    p = fused(p, r, 0.5f);
    p = fused(p, r, 1.0f);
    p = fused(p, r, 1.0f);
    return x < -87.0f ? 0.0f : p * float_of((bits_of(shifted) + 127) << 23);
}

typedef struct Paging Paging; // see section 9

// The memory of one run: the KV cache and the activations of one batch.
typedef struct {
    size_t threads;
    size_t context; // C, a multiple of KEYS
    size_t batch;   // the largest T
    Dtype kv_type;  // f16; or bf16, of which there are P = 2 in a pair, where the processor is faster at that
    uint16_t *k;    // (layers, G, C/KEYS, d/P, KEYS, P)   each block of KEYS keys is transposed
    uint16_t *v;    // (layers, G, C/P, d, P)
    float *x;       // (T, D)       the residual stream
    float *qkv;     // (T, Q + 2K)  queries, keys, values
    float *gate_up; // (T, 2F)      in the same memory: not in use at the same time
    float *logits;  // (rows, V)    of as many tokens at a time, see classify
    float *cosine;  // (T, d/2)     RoPE's rotations at the positions of the batch
    float *sine;    // (T, d/2)
    void *input;    // (T, D or Q or F)  of the next product, as its kernel takes it: f32 or bf16; see input_stride
    Dtype input_type;
    float *scratch; // (threads, scratch_size)  see scratch_of
    size_t scratch_size;
    Paging *paging; // of the weights; NULL if they are small
} State;

// An array of f32 as one of any type.
static void narrow(void *out, Dtype dtype, const float *values, size_t n) {
    if (dtype == F32)
        memcpy(out, values, n * sizeof *values);
    else if (dtype == BF16)
        for (size_t i = 0; i < n; i++)
            ((uint16_t *)out)[i] = f32_to_bf16(values[i]);
    else
        for (size_t i = 0; i < n; i++)
            ((uint16_t *)out)[i] = f32_to_f16(values[i]);
}

// The inner loops of all that follows are made of vectors and stand in the appendix. But the first is plain C and says what
// is computed: it is used for what is left over, and the tests compare the others with it.

// The dot product that matrix products are made of: sum_i a[i] b[i].
static float dot_ref(const void *a, Dtype a_type, const void *b, Dtype b_type, size_t n) {
    float sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += element(a, a_type, i) * element(b, b_type, i);
    return sum;
}

// out[t][r] = sum_c w[r][c] x[t][c], or += it, with `add`, for x (T, cols), w (rows, cols); rows of out are `stride` apart
static void multiply(float *out, size_t stride, Tensor w, Tensor x, bool add);
// The weighted sum of rows that attention is made of: y[c] += sum_j a[j] x[j][c] for a (m) f32, x (m, n) f16; or pairs
// of bf16 in both, y[c] += sum_j a[j][0] x[j][c][0] + a[j][1] x[j][c][1]. For one or QUERY_TILE vectors y, a at a time,
// which are so many f32, or pairs, apart. Reads up to a vector behind the end of x.
static void weigh(float *y, size_t y_stride, const float *a, size_t a_stride, size_t queries, const uint16_t *x,
                  bool pairs, size_t m, size_t n);
// matmul, below, with the instructions for whole tiles of bf16 that some processors have; false if this one has none.
static bool matmul_by_tiles(float *out, Tensor w, size_t T, bool add, State *s);
// Only multiplications of what is in registers, as f32 or in pairs of bf16; returns the number of operations.
static double multiply_only(bool pairs, size_t rounds);
// Called before the tensor w is used, of a file that may be larger than memory.
static void turn_pages(Paging *p, Tensor w);
static Paging *open_paging(const Model *m);
static size_t some_tokens(void); // up to so many, all pass by a few rows before the next, in matmul
static bool has_bf16_dot(void);
static bool ask_for_tiles(void); // of the system, before they are used; false if the processor has none
static const char *isa(void);

// Memory of this thread, scratch_size floats: for a row of D or F numbers, what attend has of its queries, or weights that
// are packed for tiles.
static float *scratch_of(const State *s) { return s->scratch + (size_t)omp_get_thread_num() * s->scratch_size; }

// The elements from one row of State.input to the next, if they have so many columns: whole panels, and no power of two,
// as such rows would compete for the same places in the cache.
static size_t input_stride(size_t cols) { return multiple_of(PANEL, cols) + INPUT_PAD; }

// Puts n values into row t of the next product's input (T, cols), from column c on.
static void put_input(State *s, size_t cols, size_t t, size_t c, const float *values, size_t n) {
    size_t at = t * input_stride(cols) + c;
    narrow((char *)s->input + at * size_of(s->input_type), s->input_type, values, n);
}

// out[t][r] = sum_c w[r][c] input[t][c] for w (rows, cols), input (T, cols), out (T, rows); or out += it, with `add`.
// The rows are dealt out among the threads, and no thread shares a sum with another.
static void matmul(float *out, Tensor w, size_t T, bool add, State *s) {
#pragma omp master
    turn_pages(s->paging, w);
    if (matmul_by_tiles(out, w, T, add, s))
        return;
    Tensor in = {s->input, s->input_type, T, w.cols, input_stride(w.cols)};
    // One token: each thread reads two long runs of weights. Some: few rows pass all of them on their way from memory.
    // Many: a block of rows stays in the cache.
    size_t block = T == 1 ? (w.rows + s->threads - 1) / s->threads : T <= some_tokens() ? TILE_ROWS : BLOCK_ROWS;
#pragma omp for schedule(static)
    for (size_t r = 0; r < w.rows; r += block)
        multiply(out + r, w.rows, part(w, r, smaller(block, w.rows - r), 0, w.cols), in, add);
}

// One vector: out = x / sqrt(mean(x^2) + eps) * weight                             (Zhang and Sennrich 2019)
static void rmsnorm_one(float *out, const float *x, Tensor weight, float eps) {
    size_t n = weight.cols;
    Tensor vector = {x, F32, 1, n, n};
    float squares;
    multiply(&squares, 1, vector, vector, false);
    float scale = 1.0f / sqrtf(squares / (float)n + eps);
    for (size_t i = 0; i < n; i++)
        out[i] = x[i] * scale * element(weight.data, weight.dtype, i);
}

// input (T, D) = x (T, D), normalised
static void rmsnorm(State *s, const float *x, Tensor weight, size_t T, float eps) {
#pragma omp for
    for (size_t t = 0; t < T; t++) {
        float *row = scratch_of(s);
        rmsnorm_one(row, x + t * weight.cols, weight, eps);
        put_input(s, weight.cols, t, 0, row, weight.cols);
    }
}

// x (T, D): the rows of the embedding that the tokens name
static void embed(float *x, Tensor embedding, const uint32_t *tokens, size_t T) {
    size_t D = embedding.cols;
#pragma omp for
    for (size_t t = 0; t < T; t++)
        for (size_t c = 0; c < D; c++)
            x[t * D + c] = element(embedding.data, embedding.dtype, tokens[t] * D + c);
}

// The angle by which pair i of a head turns from one position to the next: theta^(-2i/d). For a context longer than
// the first training's, "linear" scaling slows all pairs down by a factor; Llama 3's leaves those that turn more than
// high_freq_factor times within the original context, slows those of less than low_freq_factor, and mixes in between.
static float rope_frequency(const Header *h, size_t i) {
    float freq = 1.0f / powf(h->rope_theta, (float)(2 * i) / (float)h->head_dim);
    if (h->rope_scaling == ROPE_PLAIN)
        return freq;
    float slow = freq / h->rope_factor;
    if (h->rope_scaling == ROPE_LINEAR)
        return slow;
    float turns = (float)h->rope_original_max_seq_len * freq / 6.28318531f;
    float keep = (turns - h->rope_low_freq_factor) / (h->rope_high_freq_factor - h->rope_low_freq_factor);
    keep = fminf(fmaxf(keep, 0.0f), 1.0f);
    return keep * freq + (1.0f - keep) * slow;
}

// The rotations for positions pos to pos + T - 1, the same for every layer and head.
static void rope_table(const Header *h, State *s, size_t pos, size_t T) {
    size_t half = h->head_dim / 2;
#pragma omp for
    for (size_t i = 0; i < half; i++) {
        float freq = rope_frequency(h, i);
        for (size_t t = 0; t < T; t++) {
            float angle = (float)(pos + t) * freq;
            s->cosine[t * half + i] = cosf(angle);
            s->sine[t * half + i] = sinf(angle);
        }
    }
}

// Turns each pair (x[i], x[i + d/2]) of a head by its angle, in place                       (Su et al. 2021)
static void rope(float *x, const float *cosine, const float *sine, size_t half) {
    for (size_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
    }
}

// Where the cache holds the KEYS keys, or values, of head g that start at position `pos`, a multiple of KEYS.
static size_t cache_block(const Model *m, const State *s, size_t layer, size_t g, size_t pos) {
    return ((layer * m->h.n_kv_heads + g) * s->context + pos) * m->h.head_dim;
}

// Makes queries, keys and values ready: bias and norm where the model has them, then RoPE; keys and values go
// into the cache.
static void prepare_qkv(const Model *m, State *s, size_t layer, size_t pos, size_t T) {
    const Layer *l = &m->layers[layer];
    size_t d = m->h.head_dim, H = m->h.n_heads, G = m->h.n_kv_heads, P = s->kv_type == BF16 ? 2 : 1;
#pragma omp for
    for (size_t t = 0; t < T; t++)
        for (size_t head = 0; head < H + 2 * G; head++) { // of queries, then of keys, then of values
            float *x = s->qkv + (t * (H + 2 * G) + head) * d;
            for (size_t i = 0; i < d && l->bqkv.cols; i++)
                x[i] += element(l->bqkv.data, l->bqkv.dtype, head * d + i);
            if (head < H + G && m->h.flags & QK_NORM)
                rmsnorm_one(x, x, head < H ? l->q_norm : l->k_norm, m->h.norm_eps);
            if (head < H + G)
                rope(x, s->cosine + t * d / 2, s->sine + t * d / 2, d / 2);
            if (head < H)
                continue;
            uint16_t rounded[MAX_HEAD];
            narrow(rounded, s->kv_type, x, d);
            size_t slot = (pos + t) % KEYS, block = cache_block(m, s, layer, (head - H) % G, pos + t - slot);
            for (size_t c = 0; c < d; c++)
                if (head < H + G)
                    s->k[block + (c / P * KEYS + slot) * P + c % P] = rounded[c];
                else
                    s->v[block + (slot / P * d + c) * P + slot % P] = rounded[c];
        }
}

// The softmax of one block of scores, when the blocks before it had the maximum `max` and the sum `sum`. Returns the
// factor for what was added up under the old maximum.       (online softmax: Milakov and Gimelshein 2018)
static float soften(float score[KEYS], size_t visible, float scale, float *max, float *sum) {
    // Halved until one is left: vectors can do that, one running maximum or sum they cannot. Unrolled, as in a loop of
    // unknown length each half would go by way of memory.
    float fold[KEYS];
    for (size_t j = 0; j < KEYS; j++)
        fold[j] = score[j] = j < visible ? score[j] * scale : -INFINITY;
#pragma GCC unroll 6
    for (size_t half = KEYS / 2; half; half /= 2)
        for (size_t j = 0; j < half; j++)
            fold[j] = fold[j] > fold[j + half] ? fold[j] : fold[j + half];
    float new_max = *max > fold[0] ? *max : fold[0];
    for (size_t j = 0; j < KEYS; j++)
        fold[j] = score[j] = exp_negative(score[j] - new_max);
#pragma GCC unroll 6
    for (size_t half = KEYS / 2; half; half /= 2)
        for (size_t j = 0; j < half; j++)
            fold[j] += fold[j + half];
    float shrink = new_max > *max ? exp_negative(*max - new_max) : 1;
    *sum = *sum * shrink + fold[0];
    *max = new_max;
    return shrink;
}

// softmax(q . k / sqrt(d)) . v for `count` queries that share the keys and values of head g, one block of them after
// the other. Query i belongs to token i / (H/G) of the batch and sees the positions up to its own.
static void attend(const Model *m, State *s, size_t layer, size_t g, size_t first, size_t count, size_t pos) {
    const size_t d = m->h.head_dim, group = m->h.n_heads / m->h.n_kv_heads;
    const bool pairs = s->kv_type == BF16; // then queries and weights are rounded, too
    const size_t P = pairs ? 2 : 1;
    const float scale = 1.0f / sqrtf((float)d);
    _Static_assert(QUERIES * 2 * MAX_HEAD <= TILE_BLOCK * TILE_COLUMNS / 2, "scratch has room for this");
    float *q = scratch_of(s), *out = q + count * d; // (count, d) each: the queries, and what they have found
    size_t sees[QUERIES];                           // positions
    float max[QUERIES], sum[QUERIES];
    memset(out, 0, count * d * sizeof *out);
    for (size_t i = 0; i < count; i++) {
        size_t t = (first + i) / group, head = g * group + (first + i) % group;
        narrow(q + i * d, pairs ? BF16 : F32, s->qkv + t * (m->q_dim + 2 * m->kv_dim) + head * d, d);
        sees[i] = pos + t + 1;
        max[i] = -INFINITY;
        sum[i] = 0;
    }
    for (size_t start = 0; start < sees[count - 1]; start += KEYS) {
        size_t block = cache_block(m, s, layer, g, start), queries;
        for (size_t i = 0; i < count; i += queries) {
            queries = count - i >= QUERY_TILE ? QUERY_TILE : 1;
            float scores[QUERY_TILE][KEYS] = {0};
            uint16_t rounded[QUERY_TILE][KEYS]; // the same in bf16
            // scores[j] = sum_c q[c] k[c][j]: with the keys transposed, the scores are a weighted sum of rows, too. Slots
            // behind the last position hold anything; the softmax does not look at them.
            weigh(scores[0], KEYS, q + i * d, d, queries, s->k + block, pairs, d / P, KEYS);
            size_t visible = 0; // grows with j, so that the last one counts for all
            for (size_t j = 0; j < queries; j++) {
                visible = sees[i + j] > start ? smaller(KEYS, sees[i + j] - start) : 0;
                float shrink = soften(scores[j], visible, scale, &max[i + j], &sum[i + j]);
                for (size_t c = 0; c < d && shrink != 1; c++)
                    out[(i + j) * d + c] *= shrink;
                if (pairs)
                    narrow(rounded[j], BF16, scores[j], KEYS);
            }
            const void *weights = pairs ? (const void *)rounded : scores;
            weigh(out + i * d, d, weights, KEYS / P, queries, s->v + block, pairs, (visible + P - 1) / P, d);
        }
    }
    for (size_t i = 0; i < count; i++) {
        for (size_t c = 0; c < d; c++)
            out[i * d + c] /= sum[i];
        put_input(s, m->q_dim, (first + i) / group, (g * group + (first + i) % group) * d, out + i * d, d);
    }
}

// input (T, Q): each token's queries against the keys and values of all positions up to its own
static void attention(const Model *m, State *s, size_t layer, size_t pos, size_t T) {
    size_t queries = T * (m->h.n_heads / m->h.n_kv_heads); // for each head of keys
#pragma omp for collapse(2) schedule(dynamic)
    for (size_t g = 0; g < m->h.n_kv_heads; g++)
        for (size_t first = 0; first < queries; first += QUERIES)
            attend(m, s, layer, g, first, smaller(QUERIES, queries - first), pos);
}

// input (T, F) = silu(gate) * up, where silu(x) = x / (1 + e^-x)                               (Shazeer 2020)
static void swiglu(State *s, size_t T, size_t F) {
#pragma omp for
    for (size_t t = 0; t < T; t++) {
        const float *gate = s->gate_up + t * 2 * F, *up = gate + F;
        float *hidden = scratch_of(s);
        for (size_t i = 0; i < F; i++) {
            float e = exp_negative(-fabsf(gate[i]));
            float sigmoid = (gate[i] < 0 ? e : 1.0f) / (1.0f + e);
            hidden[i] = gate[i] * sigmoid * up[i];
        }
        put_input(s, F, t, 0, hidden, F);
    }
}

// ------------------------------------------------------------------------------------------------
// 3 The forward pass

enum { MAX_BATCH = 512, BATCH_BYTES = 48 << 20 }; // tokens in one pass, and what their activations may take

// The bytes of the keys, or the values, of `context` positions. May be more than memory can address.
static double cache_bytes(const Model *m, size_t context) {
    return (double)m->h.n_layers * (double)m->kv_dim * (double)multiple_of(KEYS, context) * sizeof(uint16_t);
}

// The weights of a layer's matrix products.
static size_t layer_weights(const Model *m) {
    const Layer *l = &m->layers[0];
    return (l->wqkv.rows + l->wo.cols + l->w_gate_up.rows + l->w_down.cols) * m->h.dim;
}

// How many threads are worth while: they wait for each other several times a layer. That costs microseconds, and on a
// machine with other work far more, so each has to have 768 KB of a layer's weights at least.
static size_t useful_threads(const Model *m) { return larger(1, layer_weights(m) * sizeof(uint16_t) / (768 << 10)); }

// For so many positions, and the logits of so many tokens at a time.
static State open_state(const Model *m, size_t context, size_t rows, size_t threads) {
    size_t D = m->h.dim, F = m->h.hidden_dim, Q = m->q_dim, K = m->kv_dim, d = m->h.head_dim;
    size_t widest = larger(larger(D, Q), F), outputs = larger(Q + 2 * K, 2 * F); // of a token in a product
    State s = {.threads = threads, .context = multiple_of(KEYS, context)};
    s.input_type = m->h.dtype == BF16 && has_bf16_dot() ? BF16 : F32; // the instruction takes both sides in bf16
    size_t per_token = (D + outputs + d) * sizeof(float) + input_stride(widest) * size_of(s.input_type);
    size_t room = BATCH_BYTES - smaller(BATCH_BYTES / 2, rows * m->h.vocab_size * sizeof(float)); // besides logits
    s.batch = smaller(smaller(larger(room / per_token, 1), MAX_BATCH), context);
    s.scratch_size = larger(TILE_BLOCK * TILE_COLUMNS / 2, widest); // in floats; bf16 takes half

    double bytes = 2 * cache_bytes(m, context);
    bool tiles = s.input_type == BF16 && ask_for_tiles();
    s.kv_type = s.input_type == BF16 && !tiles ? BF16 : F16; // with tiles, processors are slow at pairs
    // Zeros, from the system, which gives a page when it is first touched: half of a pair may be behind the last position,
    // and counts 0 times, so it has to be finite. And weigh reads a little more.
    s.k = bytes < 0x1p62 ? mmap(NULL, (size_t)bytes + 64, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
                         : MAP_FAILED;
    expect(s.k != MAP_FAILED, "%s: no memory for a KV cache of %zu positions: %.1f MB needed; -c takes fewer",
           m->file.path, context, bytes / 1e6);
    s.v = s.k + (size_t)bytes / 2 / sizeof *s.v;
    s.x = allocate(s.batch * D, sizeof *s.x, "the activations");
    s.qkv = s.gate_up = allocate(s.batch * outputs, sizeof *s.qkv, "the activations");
    s.logits = allocate(rows * m->h.vocab_size, sizeof *s.logits, "the logits");
    s.cosine = allocate(s.batch * d / 2, sizeof *s.cosine, "the activations");
    s.sine = allocate(s.batch * d / 2, sizeof *s.sine, "the activations");
    s.scratch = allocate(threads * s.scratch_size, sizeof *s.scratch, "the activations");
    s.paging = open_paging(m);
    // tiles read whole squares, and what they make of rows behind the last one is not used
    s.input = allocate(multiple_of(SQUARE, s.batch) * input_stride(widest), size_of(s.input_type), "the activations");
    return s;
}

// The Transformer, for T <= batch tokens at positions pos, pos + 1, ... Their keys and values join the cache;
// what the last layer makes of each token is left in s->x (T, D).
static void forward(const Model *m, State *s, const uint32_t *tokens, size_t T, size_t pos) {
    const float eps = m->h.norm_eps;
    embed(s->x, m->embedding, tokens, T);
    rope_table(&m->h, s, pos, T);
    for (size_t i = 0; i < m->h.n_layers; i++) {
        const Layer *l = &m->layers[i];
        rmsnorm(s, s->x, l->attn_norm, T, eps); // input = x, normalised
        matmul(s->qkv, l->wqkv, T, false, s);   // qkv = wqkv . input
        prepare_qkv(m, s, i, pos, T);
        attention(m, s, i, pos, T);      // input = what the heads found
        matmul(s->x, l->wo, T, true, s); // x += wo . input

        rmsnorm(s, s->x, l->ffn_norm, T, eps);
        matmul(s->gate_up, l->w_gate_up, T, false, s);
        swiglu(s, T, m->h.hidden_dim); // input = silu(gate) * up
        matmul(s->x, l->w_down, T, true, s);
    }
}

// The same by all threads; by one without OpenMP, which would make a call of the kernel after each loop to wake nobody.
static void feed_batch(const Model *m, State *s, const uint32_t *tokens, size_t T, size_t pos) {
    if (s->threads == 1)
        forward(m, s, tokens, T, pos);
    else
#pragma omp parallel num_threads((int)s->threads)
        forward(m, s, tokens, T, pos);
}

// The score of each token of the vocabulary to come after token t of the last batch, and after the n - 1 tokens that
// follow it: logits (n, V).
static void classify(const Model *m, State *s, size_t t, size_t n) {
#pragma omp parallel num_threads((int)s->threads)
    {
        rmsnorm(s, s->x + t * m->h.dim, m->final_norm, n, m->h.norm_eps);
        matmul(s->logits, m->classifier, n, false, s);
    }
}

// Of logits (V) after position pos.
static void check_finite(const Model *m, const float *logits, size_t pos) {
    size_t bad = 0;
    for (size_t i = 0; i < m->h.vocab_size; i++)
        bad += !(fabsf(logits[i]) <= FLT_MAX);
    expect(bad == 0, "%s: %zu logits after position %zu are not finite: the weights hold NaN, or are too large",
           m->file.path, bad, pos);
}

// Feeds n > 0 tokens, batch by batch, and leaves the logits for the one to come after them.
static void feed(const Model *m, State *s, const uint32_t *tokens, size_t n, size_t pos) {
    for (size_t done = 0; done < n; done += s->batch)
        feed_batch(m, s, tokens + done, smaller(s->batch, n - done), pos + done);
    classify(m, s, (n - 1) % s->batch, 1);
    check_finite(m, s->logits, pos + n - 1);
}

// ------------------------------------------------------------------------------------------------
// 4 Sampling

typedef struct {
    float key;
    uint32_t index, id, bytes; // id and bytes are the tokenizer's
} Item;

// A binary heap of Items: the one with the largest key is on top, of equal ones that with the smallest index.
typedef Buffer Heap;

static bool above(Item a, Item b) { return a.key > b.key || (a.key == b.key && a.index < b.index); }

static void heap_push(Heap *heap, Item item) {
    append(heap, &item, sizeof item);
    Item *items = heap->data;
    size_t i = heap->n / sizeof item - 1;
    for (; i > 0 && above(item, items[(i - 1) / 2]); i = (i - 1) / 2)
        items[i] = items[(i - 1) / 2];
    items[i] = item;
}

static Item heap_pop(Heap *heap) {
    heap->n -= sizeof(Item);
    Item *items = heap->data, top = items[0];
    size_t i = 0, n = heap->n / sizeof(Item);
    for (size_t child = 1; child < n; child = 2 * i + 1) {
        if (child + 1 < n && above(items[child + 1], items[child]))
            child++;
        if (!above(items[child], items[n]))
            break;
        items[i] = items[child];
        i = child;
    }
    items[i] = items[n];
    return top;
}

// A heap of the values that are not less than `least`: the largest come off it first, without sorting the rest.
static void rank(Heap *heap, const float *values, size_t n, double least) {
    heap->n = 0;
    for (size_t i = 0; i < n; i++)
        if ((double)values[i] >= least)
            heap_push(heap, (Item){.key = values[i], .index = (uint32_t)i});
}

typedef struct {
    float temperature, top_p; // top_p 0 or 1, top_k 0: off
    size_t top_k;
    uint64_t random; // the generator's state, at first the seed
    Heap heap;
    Item *kept;           // (V) the tokens to choose from, likeliest first
    float *probabilities; // (V)
} Sampler;

// A number in [0, 1): splitmix64, whose state may start anywhere              (Steele, Lea and Flood 2014)
static double random_number(uint64_t *state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

// The likeliest token.
static uint32_t argmax(const float *logits, size_t n) {
    size_t best = 0;
    for (size_t i = 1; i < n; i++)
        best = logits[i] > logits[best] ? i : best;
    return (uint32_t)best;
}

// Keeps the top_k likeliest tokens, and of those only as many as it takes to have top_p of their probability. Returns
// their number, and their probability in `mass`.
//                              (top-k: Fan et al. 2018; top-p, or nucleus sampling: Holtzman et al. 2020)
static size_t keep_likeliest(Sampler *s, size_t n, double *mass) {
    double top_p = s->top_p > 0 ? (double)s->top_p : 1;
    double target = s->top_k ? 1 : top_p; // with top_k, top_p is of what that has kept
    // Those before the last one kept have less than the target, so it is the largest that shares the rest.
    rank(&s->heap, s->probabilities, n, (1 - target) / (double)n);
    size_t limit = s->top_k ? s->top_k : n, count = 0;
    for (*mass = 0; count < limit && s->heap.n && *mass < target; *mass += (double)s->kept[count++].key)
        s->kept[count] = heap_pop(&s->heap);
    double enough = s->top_k ? top_p * *mass : *mass;
    while (count > 1 && *mass - (double)s->kept[count - 1].key >= enough)
        *mass -= (double)s->kept[--count].key;
    return count;
}

// The next token, from the logits (n).
static uint32_t sample(Sampler *s, const float *logits, size_t n) {
    uint32_t best = argmax(logits, n);
    if (s->temperature == 0)
        return best;
    float *p = s->probabilities;
    double sum = 0, mass = 1;
    for (size_t i = 0; i < n; i++)
        sum += (double)(p[i] = exp_negative((logits[i] - logits[best]) / s->temperature));
    for (size_t i = 0; i < n; i++)
        p[i] = (float)((double)p[i] / sum);
    bool all = s->top_k == 0 && (s->top_p == 0 || s->top_p == 1);
    size_t count = all ? n : keep_likeliest(s, n, &mass);
    double coin = random_number(&s->random) * mass;
    for (size_t i = 0; i < count; i++)
        if ((coin -= (double)(all ? p[i] : s->kept[i].key)) < 0)
            return all ? (uint32_t)i : s->kept[i].index;
    return best; // only rounding leads here
}

// ln of the sum of e to the logits: a logit less this is ln of its token's probability, at temperature 1
static double log_sum(const float *logits, size_t n) {
    double max = (double)logits[argmax(logits, n)], sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += exp((double)logits[i] - max);
    return max + log(sum);
}

static double log_probability(const float *logits, size_t n, uint32_t token) {
    return (double)logits[token] - log_sum(logits, n);
}

// ------------------------------------------------------------------------------------------------
// 5 The tokenizer
//
// A text is normalised and cut into words, and each word into tokens. Of both kinds of tokenizer, SentencePiece's
// starts from characters and knows bytes only as a makeshift; the byte-level one starts from bytes. What else tells one
// tokenizer from another is data in its file: how words are cut, what is merged first, which tokens are taken as they
// stand.

typedef struct {
    const unsigned char *bytes;
    size_t n;
} Text;

enum { SENTENCEPIECE_BPE = 1, BYTE_LEVEL_BPE = 2 }; // TokenizerHeader.kind
// The type of a token. A late one is user-defined, too, but sought when the text has been normalised.
enum { NORMAL = 1, UNKNOWN = 2, CONTROL = 3, USER_DEFINED = 4, UNUSED = 5, BYTE = 6, LATE = 7 };
enum { MAX_STOPS = 7, MAX_TEXT = 1 << 30, MAX_PARTS = 4 };
enum { CHARACTERS = 0x110000 }; // Unicode's numbers; from here on, bytes that are not UTF-8 stand for themselves

enum { // TokenizerHeader.flags
    ADD_BOS = 1,
    ADD_SPACE = 2,       // in front of a text
    SPACE_ANEW = 4,      // and of a text that follows a control or user-defined token
    NO_SECOND_SPACE = 8, // but not of one that begins with a space
    BY_MERGES = 16,      // the order of merging is that of the list of merges, not that of the pieces' scores
    WHOLE_WORDS = 32,    // a word that is a piece is never cut
    NFC = 64,            // text is put into Unicode's normalization form C
    ALL_TOKENIZER_FLAGS = 127
};

// The texts of a conversation around what is said, see the README
enum { BEFORE_USER, BEFORE_SYSTEM, AFTER_SYSTEM, AFTER_USER, BEFORE_ANSWER, AFTER_ANSWER, NEXT_USER, TEMPLATES };
enum { HAS_TEMPLATE = 1, HAS_SYSTEM = 2, ALL_TEMPLATE_FLAGS = 1023 }; // TokenizerHeader.template_flags
#define TEXT_ITEM 0x80000000u // in a template, so many bytes of text; other items are ids of tokens

// The start of a tokenizer file, byte for byte. Then for each token u32 length, u32 type, f32 score, and the bytes that
// it prints; zeros up to a multiple of 4 bytes; the merges, the ranges of characters, the steps of the machines that
// cut words, what NFC needs, and the templates.
typedef struct {
    char magic[8]; // "twotoken"
    uint32_t version, kind, flags, vocab_size;
    int32_t bos_id, unk_id; // -1: none
    uint32_t n_stops;
    int32_t stop_ids[MAX_STOPS];
    uint64_t file_size, vocab_hash;
    uint32_t n_merges, n_ranges, n_classes, n_states, n_machines, template_flags;
    uint64_t rest_hash; // of all that follows the tokens
} TokenizerHeader;
_Static_assert(sizeof(TokenizerHeader) == 112, "the compiler added padding to TokenizerHeader");

typedef struct {
    Text text; // in the mapped file
    uint32_t type;
    float score; // of all neighbours, those that make the piece of the highest score are merged first
} Piece;

// A hash table of the pieces, by their texts, or of rows of numbers, by one or two that they begin with.
typedef struct {
    const void *rows;
    size_t row_size, key_size; // bytes; key_size 0: pieces
    uint32_t *places;          // (mask + 1) numbers of rows, NONE where empty
    size_t mask;               // a power of 2, less 1
} Table;

typedef struct {
    const char *path;
    TokenizerHeader h;
    Piece *pieces;             // (V)
    Table by_text;             // normal and user-defined pieces
    size_t longest[256];       // bytes of the longest user-defined one that starts with this byte, 0 if there is none
    uint32_t byte_id[256];     // the token for each byte; unk_id, or NONE, where there is none
    Table merges;              // (n_merges) two tokens and what they make, the first to be done first
    uint8_t *classes;          // (CHARACTERS + 256) the class of each character, by which words are cut
    const uint32_t *steps;     // (n_states, n_classes) the machines
    Table decompositions;      // for NFC: a character, and the MAX_PARTS that it stands for, 0 after the last
    Table compositions;        // two characters and what they make
    uint8_t *combining;        // (CHARACTERS + 256) the combining class of each character, 0 of a starter
    Text templates[TEMPLATES]; // items: the id of a token, or a TEXT_ITEM and its bytes
} Tokenizer;

// FNV-1a: finds pieces and merges, and tells one vocabulary from another.
static uint64_t hash_of(Text text) {
    uint64_t hash = 0xcbf29ce484222325;
    for (size_t i = 0; i < text.n; i++)
        hash = (hash ^ text.bytes[i]) * 0x100000001b3;
    return hash;
}

// An empty table for n rows, which will not be more than half full.
static Table new_table(const void *rows, size_t n, size_t row_size, size_t key_size) {
    Table table = {.rows = rows, .row_size = row_size, .key_size = key_size};
    while (table.mask < 2 * n)
        table.mask = 2 * table.mask + 1;
    table.places = allocate(table.mask + 1, sizeof *table.places, "the tokenizer");
    for (size_t i = 0; i <= table.mask; i++)
        table.places[i] = NONE;
    return table;
}

static Text key_of(const Table *table, uint32_t i) {
    const void *row = (const char *)table->rows + i * table->row_size;
    return table->key_size ? (Text){row, table->key_size} : ((const Piece *)row)->text;
}

// The place in the table of the row with this key, or the empty place where it would go.
static uint32_t *place_of(const Table *table, Text key) {
    size_t i = hash_of(key) & table->mask;
    for (; table->places[i] != NONE; i = (i + 1) & table->mask) {
        Text other = key_of(table, table->places[i]);
        if (other.n == key.n && !memcmp(other.bytes, key.bytes, key.n))
            break;
    }
    return &table->places[i];
}

static uint32_t find_piece(const Tokenizer *t, Text text) { return *place_of(&t->by_text, text); }

// The row that begins with one or two numbers, as the table's rows do; NULL if there is none.
static const uint32_t *find_row(const Table *table, uint32_t a, uint32_t b) {
    const uint32_t numbers[2] = {a, b}, row = *place_of(table, (Text){(const unsigned char *)numbers, table->key_size});
    return row == NONE ? NULL : (const void *)key_of(table, row).bytes;
}

static void check_tokenizer_header(const Tokenizer *t, size_t size) {
    const TokenizerHeader *h = &t->h;
    check(t->path, "version", h->version, 2, 2);
    check(t->path, "kind", h->kind, SENTENCEPIECE_BPE, BYTE_LEVEL_BPE);
    check(t->path, "flags", h->flags, 0, ALL_TOKENIZER_FLAGS);
    check(t->path, "vocab_size", h->vocab_size, 1, 1 << 24);
    check(t->path, "bos_id", h->bos_id, h->flags & ADD_BOS ? 0 : -1, h->vocab_size - 1);
    check(t->path, "unk_id", h->unk_id, -1, h->vocab_size - 1);
    check(t->path, "n_stop_ids", h->n_stops, 0, MAX_STOPS);
    for (size_t i = 0; i < h->n_stops; i++)
        check(t->path, "stop id", h->stop_ids[i], 0, h->vocab_size - 1);
    check(t->path, "n_machines", h->n_machines, 0, 16);
    check(t->path, "n_classes", h->n_classes, h->n_machines ? 2 : 0, 256);
    check(t->path, "n_states", h->n_states, h->n_machines ? h->n_machines + 1 : 0, 1 << 20);
    check(t->path, "template_flags", h->template_flags, 0, ALL_TEMPLATE_FLAGS);
    check_size(t->path, h->file_size, size);
}

// Numbers of at most `most`, which start at a multiple of 4 bytes.
static const void *next_numbers(File *f, const char *what, size_t n, double most) {
    const uint32_t *numbers = next_bytes(f, what, n * sizeof *numbers);
    for (size_t i = 0; i < n; i++)
        check(f->path, what, numbers[i], 0, most);
    return numbers;
}

// The next n rows of so many numbers, by the first n_keys of them. Of two rows with the same key the later counts.
static Table next_table(File *f, const char *what, uint32_t n, size_t numbers, size_t n_keys, double most) {
    const void *rows = next_numbers(f, what, n * numbers, most);
    Table table = new_table(rows, n, numbers * sizeof(uint32_t), n_keys * sizeof(uint32_t));
    for (uint32_t i = 0; i < n; i++)
        *place_of(&table, key_of(&table, i)) = i;
    return table;
}

static void check_hash(const char *path, const char *what, uint64_t promised, Text text) {
    uint64_t hash = hash_of(text);
    expect(hash == promised, "%s: hash of %s: expected %016llx, found %016llx: damaged", path, what,
           (unsigned long long)promised, (unsigned long long)hash);
}

// The vocabulary, and the tables of pieces and bytes.
static void read_pieces(Tokenizer *t, File *f) {
    t->pieces = allocate(t->h.vocab_size, sizeof *t->pieces, "the vocabulary");
    t->by_text = new_table(t->pieces, t->h.vocab_size, sizeof *t->pieces, 0);
    for (size_t b = 0; b < 256; b++)
        t->byte_id[b] = (uint32_t)t->h.unk_id; // -1 becomes NONE
    for (uint32_t id = 0; id < t->h.vocab_size; id++) {
        struct {
            uint32_t length, type;
            float score;
        } e;
        memcpy(&e, next_bytes(f, "a token", sizeof e), sizeof e);
        check(f->path, "a token's type", e.type, NORMAL, LATE);
        check(f->path, "a token's length", e.length, e.type != UNUSED, e.type == BYTE ? 1 : UINT32_MAX);
        check(f->path, "a token's score", e.score, -FLT_MAX, FLT_MAX);
        Text text = {next_bytes(f, "a token's text", e.length), e.length};
        t->pieces[id] = (Piece){text, e.type, e.score};
        bool user_defined = e.type == USER_DEFINED || e.type == LATE;
        uint32_t *place = place_of(&t->by_text, text);
        if (user_defined || (e.type == NORMAL && *place == NONE))
            *place = id;
        if (user_defined)
            t->longest[*text.bytes] = larger(t->longest[*text.bytes], text.n);
        if (e.type == BYTE)
            t->byte_id[*text.bytes] = id;
    }
    for (size_t b = 0; b < 256; b++)
        expect(t->byte_id[b] != NONE || t->h.kind == BYTE_LEVEL_BPE,
               "%s: expected a token for each byte, or an unk_id, found none for byte %zu", t->path, b);
}

// Spreads ranges out over all characters, so that the class of one is found in one step.
static uint8_t *next_classes(File *f, const char *what, uint32_t n, int usual, double most) {
    uint8_t *classes = allocate(CHARACTERS + 256, 1, what);
    memset(classes, usual, CHARACTERS + 256);
    const uint32_t *range = next_numbers(f, what, (size_t)n * 3, CHARACTERS - 1);
    for (uint32_t i = 0, next = 0; i < n; i++, range += 3) {
        uint32_t first = range[0], last = range[1], class = range[2];
        check(f->path, what, first, next, last);
        check(f->path, what, class, 1, most);
        memset(classes + first, (int)class, last - first + 1);
        next = last + 1;
    }
    return classes;
}

static uint32_t next_number(File *f, const char *what) {
    uint32_t number;
    memcpy(&number, next_bytes(f, what, sizeof number), sizeof number);
    return number;
}

// The next part of a template: a token, or NONE and a text.
static uint32_t next_item(File *f, Text *text) {
    uint32_t item = next_number(f, "a template's item"), n = item & TEXT_ITEM ? item ^ TEXT_ITEM : 0;
    *text = (Text){next_bytes(f, "a template's text", n), n};
    return item & TEXT_ITEM ? NONE : item;
}

// Checks a template, a row of such items.
static Text next_template(const Tokenizer *t, File *f) {
    uint32_t n = next_number(f, "a template"), token;
    Text items = {next_bytes(f, "a template", n), n}, text;
    for (File in = {f->path, items.bytes, n, 0, -1}; in.at < n;)
        if ((token = next_item(&in, &text)) != NONE)
            check(f->path, "a template's token", token, 0, t->h.vocab_size - 1);
    return items;
}

static Tokenizer open_tokenizer(const char *path) {
    Tokenizer t = {.path = path};
    File f = map_file(path, "twotoken", sizeof t.h, "a tokenizer file");
    close(f.fd);
    memcpy(&t.h, next_bytes(&f, "header", sizeof t.h), sizeof t.h);
    check_tokenizer_header(&t, f.n);
    read_pieces(&t, &f);
    check_hash(path, "the vocabulary", t.h.vocab_hash, (Text){f.bytes + sizeof t.h, f.at - sizeof t.h});
    check_hash(path, "what follows the vocabulary", t.h.rest_hash, (Text){f.bytes + f.at, f.n - f.at});
    next_bytes(&f, "zeros", -f.at % 4);

    t.merges = next_table(&f, "a merge", t.h.n_merges, 3, 2, t.h.vocab_size - 1);
    t.classes = next_classes(&f, "a range of characters", t.h.n_ranges, 1, (double)t.h.n_classes - 1);
    memset(t.classes + CHARACTERS, t.classes[0xfffd], 256);
    t.steps = next_numbers(&f, "a step", (size_t)t.h.n_states * t.h.n_classes, 2 * (double)t.h.n_states - 1);
    if (t.h.flags & NFC) {
        const uint32_t *n = next_numbers(&f, "NFC", 3, CHARACTERS);
        t.decompositions = next_table(&f, "a decomposition", n[0], 1 + MAX_PARTS, 1, CHARACTERS - 1);
        t.compositions = next_table(&f, "a composition", n[1], 3, 2, CHARACTERS - 1);
        t.combining = next_classes(&f, "a combining class", n[2], 0, 255);
    }
    for (size_t i = 0; i < TEMPLATES; i++)
        t.templates[i] = next_template(&t, &f);
    expect(f.at == f.n, "%s: expected %zu bytes by its contents, found %zu", path, f.at, f.n);
    return t;
}

// The length of the UTF-8 character that starts here; 0 if none can; -1 if one might, with more bytes.
static int utf8_length(Text text) {
    unsigned char lead = text.bytes[0];
    int length = lead < 0x80 ? 1 : lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
    // The second byte's range excludes overlong forms, surrogates, and what is beyond U+10FFFF.
    unsigned char low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    unsigned char high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    for (int i = 1; i < length; i++, low = 0x80, high = 0xbf) {
        if ((size_t)i == text.n)
            return -1;
        if (text.bytes[i] < low || text.bytes[i] > high)
            return 0;
    }
    return length;
}

// The first character of a text, which is not empty, and its number. A stray byte stands for itself.
static Text first_character(Text text, uint32_t *number) {
    int length = utf8_length(text);
    *number = length <= 0 ? CHARACTERS + (uint32_t)*text.bytes : *text.bytes & (length == 1 ? 0x7fu : 0x7fu >> length);
    for (int i = 1; i < length; i++)
        *number = *number << 6 | (text.bytes[i] & 0x3f);
    return (Text){text.bytes, length > 0 ? (size_t)length : 1};
}

static bool is_utf8(Text text) {
    uint32_t number = 0;
    for (size_t at = 0; at < text.n && number < CHARACTERS;)
        at += first_character((Text){text.bytes + at, text.n - at}, &number).n;
    return number < CHARACTERS;
}

// Writes a character as UTF-8, or a stray byte, and returns its length.
static size_t put_character(uint32_t c, unsigned char *out) {
    size_t n = c < 0x80 || c >= CHARACTERS ? 1 : c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = n - 1; i > 0; i--, c >>= 6)
        out[i] = 0x80 | (c & 0x3f);
    out[0] = (unsigned char)(n == 1 ? c : c | 0xf00 >> n);
    return n;
}

// Replaces a character by those that it stands for, which may be itself alone, and returns their number.
static size_t decompose(const Tokenizer *t, uint32_t *c) {
    const uint32_t *row = t->h.flags & NFC ? find_row(&t->decompositions, *c, 0) : NULL;
    size_t n = 0;
    for (; row && n < MAX_PARTS && row[1 + n]; n++)
        c[n] = row[1 + n];
    return n ? n : 1;
}

// Puts n decomposed characters into NFC and returns how many are left. Marks after a starter, a character of the
// combining class 0, are sorted by their class. Then each character is composed with the last starter, unless another
// stands in between that has the same class, or is a starter.                            (Unicode Standard Annex 15)
static size_t compose(const Tokenizer *t, Heap *marks, uint32_t *c, size_t n) {
    for (size_t i = 0, at; i < n; i++) {
        for (at = i; i < n && t->combining[c[i]]; i++)
            heap_push(marks, (Item){.key = -(float)t->combining[c[i]], .index = (uint32_t)i, .id = c[i]});
        while (marks->n)
            c[at++] = heap_pop(marks).id;
    }
    size_t left = 0, starter = n; // n: there has been none
    uint8_t before = 0;           // the class of the last one left
    for (size_t i = 0; i < n; i++) {
        uint8_t class = t->combining[c[i]];
        bool open = starter < n && (starter + 1 == left || before < class);
        const uint32_t *row = open ? find_row(&t->compositions, c[starter], c[i]) : NULL;
        if (row) {
            c[starter] = row[2];
        } else {
            starter = class ? starter : left;
            before = class;
            c[left++] = c[i];
        }
    }
    return left;
}

// A part of a word on its way to becoming a token. Neighbours are linked by their index, NONE at the ends.
typedef struct {
    Text text;   // empty once it has become part of the symbol before it
    uint32_t id; // NONE: no token of the vocabulary
    uint32_t previous, next;
} Symbol;

typedef struct {
    Buffer *tokens; // found so far
    bool add_space; // in front of the next text
    Buffer symbols; // of a word
    Heap pairs;     // of neighbours to be merged, key: how soon, index: the first, id: what they make, bytes: of both
    Buffer characters, normal; // of a text, and the same as bytes
} Encoder;

// The text as the vocabulary has it: in NFC, and "▁", by which SentencePiece means a space, is one. There is room for a
// byte in front of it.
static Text normalise(const Tokenizer *t, Encoder *e, Text text) {
    bool nfc = t->h.flags & NFC, bars = t->h.kind == SENTENCEPIECE_BPE;
    uint32_t *c = reserve(&e->characters, text.n * (nfc ? MAX_PARTS : 1) * sizeof *c);
    size_t n = 0, end = 1;
    for (size_t at = 0; at < text.n; n += decompose(t, c + n))
        at += first_character((Text){text.bytes + at, text.n - at}, c + n).n;
    n = nfc ? compose(t, &e->pairs, c, n) : n;
    unsigned char *out = reserve(&e->normal, 4 * n + 1);
    for (size_t i = 0; i < n; i++)
        end += put_character(bars && c[i] == 0x2581 ? ' ' : c[i], out + end);
    expect(end <= MAX_TEXT, "the prompt: expected at most %d bytes, found %zu", MAX_TEXT, end);
    return (Text){out + 1, end - 1};
}

// Cuts a word into the symbols that merging starts from and returns their number.
static uint32_t first_symbols(const Tokenizer *t, Encoder *e, Text word) {
    Symbol *symbols = reserve(&e->symbols, word.n * sizeof *symbols);
    bool characters = t->h.kind == SENTENCEPIECE_BPE;
    uint32_t n = 0, number;
    for (size_t at = 0; at < word.n;) {
        Text text = first_character((Text){word.bytes + at, characters ? word.n - at : 1}, &number);
        uint32_t id = characters ? find_piece(t, text) : t->byte_id[*text.bytes];
        at += text.n;
        if (characters || id != NONE) { // a byte that the vocabulary cannot say is left out
            symbols[n] = (Symbol){text, id, n - 1, n + 1};
            n++;
        }
    }
    if (n)
        symbols[n - 1].next = NONE;
    return n;
}

// Considers merging symbol `first` with the next.
static void push_pair(const Tokenizer *t, Encoder *e, uint32_t first) {
    const Symbol *symbols = e->symbols.data;
    if (first == NONE || symbols[first].next == NONE)
        return;
    const Symbol *a = &symbols[first], *b = &symbols[a->next];
    Item pair = {.index = first, .bytes = (uint32_t)(a->text.n + b->text.n)};
    if (t->h.flags & BY_MERGES) {
        const uint32_t *merge = find_row(&t->merges, a->id, b->id);
        pair.id = merge ? merge[2] : NONE;
        pair.key = merge ? -(float)((merge - (const uint32_t *)t->merges.rows) / 3) : 0;
    } else {
        pair.id = find_piece(t, (Text){a->text.bytes, pair.bytes});
        pair.key = pair.id == NONE ? 0 : t->pieces[pair.id].score;
    }
    if (pair.id != NONE)
        heap_push(&e->pairs, pair);
}

// Byte-pair encoding: merges the pair of the highest key, the leftmost of equals, until none is left. As a heap finds
// it, that takes n log n steps.                                          (Sennrich, Haddow and Birch 2016)
static void encode_word(const Tokenizer *t, Encoder *e, Text word) {
    uint32_t whole = t->h.flags & WHOLE_WORDS ? find_piece(t, word) : NONE;
    if (whole != NONE) {
        push_token(e->tokens, whole);
        return;
    }
    uint32_t n = first_symbols(t, e, word);
    Symbol *symbols = e->symbols.data;
    for (uint32_t i = 0; i < n; i++)
        push_pair(t, e, i);
    while (e->pairs.n) {
        Item pair = heap_pop(&e->pairs);
        Symbol *first = &symbols[pair.index];
        if (first->text.n == 0 || first->next == NONE || first->text.n + symbols[first->next].text.n != pair.bytes)
            continue; // one of the two has been merged with another since
        Symbol *second = &symbols[first->next];
        first->text.n += second->text.n;
        first->id = pair.id;
        second->text.n = 0;
        first->next = second->next;
        if (first->next != NONE)
            symbols[first->next].previous = pair.index;
        push_pair(t, e, first->previous);
        push_pair(t, e, pair.index);
    }
    for (uint32_t i = n ? 0 : NONE; i != NONE; i = symbols[i].next) {
        if (symbols[i].id != NONE) {
            push_token(e->tokens, symbols[i].id);
            continue;
        }
        for (size_t b = 0; b < symbols[i].text.n; b++) { // a token for each byte, or one <unk> for all
            uint32_t id = t->byte_id[symbols[i].text.bytes[b]];
            if (id != (uint32_t)t->h.unk_id || last_token(*e->tokens) != id)
                push_token(e->tokens, id);
        }
    }
}

// The longest token of a type that is user-defined at the start of a text that is not empty; NONE if there is none.
static uint32_t find_user_defined(const Tokenizer *t, Text text, uint32_t type) {
    for (size_t n = smaller(text.n, t->longest[*text.bytes]); n > 0; n--) {
        uint32_t id = find_piece(t, (Text){text.bytes, n});
        if (id != NONE && t->pieces[id].type == type)
            return id;
    }
    return NONE;
}

// How many bytes at the start of a text are a word to the machine that starts in `state`; 0 if no word starts here.
// Each character is a step: from the state that the machine is in, and the character's class, to twice the next state,
// plus 1 if what lies before this character is a word. The last word found counts. State 0 is the end of all hope, and
// class 0 stands for the end of the text. export.py makes the machines from the regular expressions that a tokenizer
// comes with; they never go back, so the time is linear.                                    (Thompson 1968)
static size_t word_length(const Tokenizer *t, uint32_t state, Text text) {
    size_t word = 0;
    uint32_t number;
    for (size_t at = 0, length; state; at += length) {
        bool more = at < text.n;
        length = more ? first_character((Text){text.bytes + at, text.n - at}, &number).n : 0;
        uint32_t step = t->steps[(size_t)state * t->h.n_classes + (more ? t->classes[number] : 0)];
        word = step & 1 ? at : word;
        state = more ? step >> 1 : 0;
    }
    return word;
}

enum { AS_WRITTEN, NORMALISED, WORDS }; // stages of encoding

// Adds the tokens of a text that is not empty, stage by stage. In the text as it is written, user-defined tokens are
// found, the longest at each place; what lies between them is normalised and searched for the late ones; and the rest
// is cut into words. Each machine that cuts words is a stage: its words, and what lies between them, go to the next.
static void encode_stage(const Tokenizer *t, Encoder *e, Text text, uint32_t stage) {
    if (stage == NORMALISED)
        text = normalise(t, e, text);
    // With NO_SECOND_SPACE, a space is added to what is cut into words, else before late tokens are sought.
    bool to_words = t->h.flags & NO_SECOND_SPACE;
    if (e->add_space && stage == (to_words ? WORDS : NORMALISED) && !(to_words && *text.bytes == ' ')) {
        text = (Text){text.bytes - 1, text.n + 1};
        *(unsigned char *)text.bytes = ' ';
    }
    if (stage == WORDS + t->h.n_machines) {
        encode_word(t, e, text);
        return;
    }
    for (size_t start = 0, at = 0; start < text.n; start = at) {
        uint32_t token = NONE, number;
        size_t found = 0; // bytes
        while (at < text.n) {
            Text rest = {text.bytes + at, text.n - at};
            token = stage < WORDS ? find_user_defined(t, rest, stage == AS_WRITTEN ? USER_DEFINED : LATE) : NONE;
            found = token != NONE ? t->pieces[token].text.n : stage < WORDS ? 0 : word_length(t, stage - 1, rest);
            if (found)
                break;
            at += stage < WORDS ? 1 : first_character(rest, &number).n;
        }
        if (at > start)
            encode_stage(t, e, (Text){text.bytes + start, at - start}, stage + 1);
        if (token != NONE) {
            push_token(e->tokens, token);
            e->add_space = t->h.flags & SPACE_ANEW;
        } else if (found) {
            encode_stage(t, e, (Text){text.bytes + at, found}, stage + 1);
        }
        at += found;
    }
}

// Appends the tokens of a text to those before it. If there are none, the tokenizer may want bos, and a space in front
// of the text; that also after a control or user-defined token. No text becomes a control token: those are not in the
// table.
static void encode(const Tokenizer *t, Buffer *tokens, Text text) {
    uint32_t last = tokens->n ? t->pieces[last_token(*tokens)].type : CONTROL;
    uint32_t wanted = tokens->n == 0 ? ADD_SPACE : last == NORMAL || last == BYTE ? 0 : SPACE_ANEW;
    Encoder e = {.tokens = tokens, .add_space = t->h.flags & wanted};
    if (tokens->n == 0 && t->h.flags & ADD_BOS)
        push_token(tokens, (uint32_t)t->h.bos_id);
    encode_stage(t, &e, text, AS_WRITTEN);
    void *const memory[] = {e.symbols.data, e.pairs.data, e.characters.data, e.normal.data};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
        free(memory[i]);
}

// What the token at position `pos` prints. At the start of a text, that is without the space put there by encode.
static Text decode(const Tokenizer *t, uint32_t token, size_t pos) {
    Text text = t->pieces[token].text;
    uint32_t type = t->pieces[token].type;
    if (type == UNKNOWN || type == CONTROL || type == UNUSED)
        return (Text){0};
    bool skip = pos == (t->h.flags & ADD_BOS ? 1 : 0) && t->h.flags & ADD_SPACE && text.bytes[0] == ' ';
    return (Text){text.bytes + skip, text.n - skip};
}

static bool is_stop(const Tokenizer *t, uint32_t token) {
    for (size_t i = 0; i < t->h.n_stops; i++)
        if ((int32_t)token == t->h.stop_ids[i])
            return true;
    return (int32_t)token == t->h.bos_id;
}

// ------------------------------------------------------------------------------------------------
// 6 Modes

typedef struct {
    const char *model, *tokenizer, *mode, *prompt, *prompt_file, *system;
    float temperature, top_p;
    uint64_t top_k, steps, context, threads, seed;
    uint64_t prefill, decode, repeat; // what bench measures: tokens (0: as many as usual), and how often
    uint64_t stride;                  // of perplexity's windows
    uint64_t draft;                   // tokens that are guessed at a time, at most
    bool json, probs;
} Options;

// Of a conversation.
typedef struct {
    Buffer said;   // bytes, by the user
    Buffer answer; // tokens, as they were sampled: encode might find others for the same text
} Turn;

enum { MAX_DRAFT = 15 }; // the logits of each take memory

// All that the modes work with. It lives as long as the program, which never frees it.
typedef struct {
    Options o;
    Model m;
    Tokenizer t;
    State state;
    Sampler sampler;
    size_t context; // in tokens

    FILE *input; // the text to be read, NULL when it has ended
    char *line;  // of it
    size_t capacity;
    Buffer text;   // bytes that are to follow the tokens
    Buffer tokens; // what the model reads, and what it has said

    size_t n_cached;                // so many of the tokens are in the KV cache
    size_t n_guesses, n_right;      // behind the tokens, in the cache too, and how many of them have proved right
    Buffer turns;                   // of a conversation
    size_t first_turn;              // those before it are forgotten
    size_t n_read, n_said, n_after; // tokens read, said, and said after the first one of an answer
    size_t n_saved;                 // of these, those that had been guessed
    double reading, saying;         // seconds

    bool terminal, colours; // is standard output one, and does it get colours
    Buffer pending;         // bytes to be printed, of a character that is not complete yet
    int colour;             // of what is pending
    bool skip_space;        // until something else is printed
} Session;

static size_t n_turns(const Session *s) { return s->turns.n / sizeof(Turn); }

static Text text_of(const char *string) { return (Text){(const unsigned char *)string, strlen(string)}; }

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void flush_output(void) {
    expect(!fflush(stdout) && !ferror(stdout), "standard output: cannot write: %s", strerror(errno));
}

static bool is_space(unsigned char c) { return c == ' ' || (c >= '\t' && c <= '\r'); }

// How characters are printed: as they are; so that a terminal does not obey what a model says, with control characters
// and bytes that are not UTF-8 as \x1b; also with \" \\ \n \t \u001b, as between quotes; and as JSON, which cannot say
// such bytes: they become U+FFFD.
typedef enum { PLAIN, FOR_TERMINAL, QUOTED, JSON } Style;

static void print_text(Text text, Style style) {
    const char *special = "\n\t\"\\", *names = "nt\"\\";
    Text c;
    for (size_t at = 0; at < text.n; at += c.n) {
        uint32_t number;
        c = first_character((Text){text.bytes + at, text.n - at}, &number);
        const char *found = number ? strchr(special, *c.bytes) : NULL;
        bool stray = number >= CHARACTERS, control = number < 0x20 || (number >= 0x7f && number < 0xa0);
        if (style >= QUOTED && found)
            printf("\\%c", names[found - special]);
        else if (style >= QUOTED && (control || (stray && style == JSON)))
            printf("\\u%04x", stray ? 0xfffd : number);
        else if (style != PLAIN && (stray || (control && !found)))
            for (size_t i = 0; i < c.n; i++)
                printf("\\x%02x", c.bytes[i]);
        else
            fwrite(c.bytes, 1, c.n, stdout);
    }
}

static void print_quoted(Text text, Style style) {
    putchar('"');
    print_text(text, style);
    putchar('"');
}

// How many bytes at the end of a text may be the start of a character.
static size_t n_incomplete(Text text) {
    for (size_t n = smaller(text.n, 3); n > 0; n--)
        if (utf8_length((Text){text.bytes + text.n - n, n}) < 0)
            return n;
    return 0;
}

// Prints a text piece by piece without ever splitting a character: the bytes of one that is not complete wait for the
// next piece, but not at the end. What is printed at a time has one colour, that of its first byte; 0: none.
static void stream_text(Session *s, Text text, int colour, bool end) {
    for (; s->skip_space && text.n && is_space(*text.bytes); text.n--)
        text.bytes++;
    s->skip_space = s->skip_space && text.n == 0 && !end;
    s->colour = s->pending.n ? s->colour : colour;
    append(&s->pending, text.bytes, text.n);
    text = (Text){s->pending.data, s->pending.n};
    text.n -= end ? 0 : n_incomplete(text);
    bool coloured = text.n && s->colour;
    if (coloured)
        printf("\x1b[38;5;%dm", s->colour);
    print_text(text, s->terminal ? FOR_TERMINAL : PLAIN);
    fputs(coloured ? "\x1b[0m" : "", stdout); // at once, so that Ctrl-C leaves the terminal as it was
    cut_front(&s->pending, text.n);
}

static void print_ids(Buffer tokens, const char *between) {
    const uint32_t *ids = tokens.data;
    for (size_t i = 0; i < n_tokens(tokens); i++)
        printf("%s%u", i ? between : "", ids[i]);
}

// What is to be read: the text of -i or -f, or none; in a chat, the lines of -f or of standard input.
static FILE *open_input(const Options *o) {
    bool lines = !strcmp(o->mode, "chat");
    const char *name = o->prompt_file ? o->prompt_file : lines ? "-" : "/dev/null";
    FILE *file = o->prompt && *o->prompt && !lines ? fmemopen((char *)o->prompt, strlen(o->prompt), "r")
                 : strcmp(name, "-")               ? fopen(name, "rb")
                                                   : stdin;
    expect(file, "%s: cannot read: %s", name, strerror(errno));
    return file;
}

// Makes tokens of the text that is to follow them. It is tokenized as one, whoever wrote its parts.
static void end_text(Session *s) {
    encode(&s->t, &s->tokens, (Text){s->text.data, s->text.n});
    s->text.n = 0;
}

enum { READ_AT_ONCE = 1 << 20 }; // bytes of a text that become tokens at a time

// Reads on until there are so many tokens, or SIZE_MAX: to the end of the text, at once. A piece ends between lines,
// before what is no space: no token of the usual tokenizers lies across that. If there is no such place, it is longer.
static void read_tokens(Session *s, size_t least) {
    while (s->input && n_tokens(s->tokens) < least) {
        bool complete = false; // the piece, and there is more
        for (int c; !complete && (c = getc_unlocked(s->input)) != EOF;) {
            const char byte = (char)c;
            append(&s->text, &byte, 1);
            expect(s->text.n <= MAX_TEXT, "the prompt: expected at most %d bytes, found more", MAX_TEXT);
            if (c == '\n' && s->text.n >= READ_AT_ONCE && least != SIZE_MAX) {
                int next = ungetc(getc(s->input), s->input); // a look at it
                complete = next != EOF && !is_space((unsigned char)next);
            }
        }
        expect(!ferror(s->input), "%s: cannot read the prompt: %s", s->o.prompt_file, strerror(errno));
        end_text(s);
        s->input = complete ? s->input : NULL;
    }
}

// The ids of the prompt on one line, as the model would receive them.
static void tokenize(Session *s) {
    read_tokens(s, SIZE_MAX);
    const uint32_t *tokens = s->tokens.data;
    fputs(s->o.json ? "{\"tokens\": [" : "", stdout);
    print_ids(s->tokens, s->o.json ? ", " : " ");
    fputs(s->o.json ? "], \"pieces\": [" : "", stdout);
    for (size_t i = 0; s->o.json && i < n_tokens(s->tokens); i++) {
        fputs(i ? ", " : "", stdout);
        print_quoted(s->t.pieces[tokens[i]].text, JSON);
    }
    fputs(s->o.json ? "]}\n" : "\n", stdout);
}

// Of the 256 colours, some that can be read on black and on white, and from which probability on each is used.
static const struct {
    double from;
    int colour;
} shades[] = {{0.8, 28}, {0.4, 64}, {0.1, 136}, {0.02, 166}, {0, 160}};

static int colour_of(double probability) {
    size_t i = 0;
    while (probability < shades[i].from)
        i++;
    return shades[i].colour;
}

static void print_legend(void) {
    fputs("probability, at least:", stderr);
    for (size_t i = 0; i < sizeof shades / sizeof *shades; i++)
        fprintf(stderr, " \x1b[38;5;%dm%g%%\x1b[0m", shades[i].colour, 100 * shades[i].from);
    fputs("\n\n", stderr);
}

// The logits after the last token.
static float *logits_of(const Session *s) { return s->state.logits + s->n_right * s->m.h.vocab_size; }

// A token at position pos as a JSON object, open for more; `text` is what it prints there, and `bytes` the same if that
// is no whole character, as JSON has no text of those.
static void open_json(const Tokenizer *t, uint32_t token, size_t pos, double logprob) {
    Text text = decode(t, token, pos);
    printf("{\"id\": %u, \"text\": ", token);
    print_quoted(text, JSON);
    if (!is_utf8(text)) {
        for (size_t i = 0; i < text.n; i++)
            printf("%s%u", i ? ", " : ", \"bytes\": [", text.bytes[i]);
        putchar(']');
    }
    printf(", \"logprob\": %.6f", logprob);
}

// The width of the terminal, within reason.
static size_t terminal_columns(void) {
    const char *set = getenv("COLUMNS");
    long columns = set ? atol(set) : 0;
    struct winsize size = {0};
    if (columns <= 0 && !ioctl(STDOUT_FILENO, TIOCGWINSZ, &size))
        columns = size.ws_col;
    return columns <= 0 ? 80 : smaller(larger((size_t)columns, 20), 300);
}

// A bar of `part` of so many columns, to the eighth of one.
static void print_bar(double part, size_t columns) {
    static const char *const blocks[] = {" ", "▏", "▎", "▍", "▌", "▋", "▊", "▉", "█"};
    size_t eighths = (size_t)(8 * (double)columns * part + 0.5);
    for (size_t i = 0; i < columns; i++) {
        fputs(blocks[smaller(8, eighths)], stdout);
        eighths -= smaller(8, eighths);
    }
}

// The k likeliest tokens at position pos: a JSON array; or a line each, at whose end is what has no certain width, the
// token.
static void print_likeliest(Session *s, size_t k, size_t pos) {
    const float *logits = logits_of(s);
    size_t vocab = s->m.h.vocab_size;
    double total = log_sum(logits, vocab), rest = 1;
    float most = logits[argmax(logits, vocab)];
    rank(&s->sampler.heap, logits, vocab, -INFINITY);
    for (size_t i = 0; i < k && i < vocab; i++) {
        Item item = heap_pop(&s->sampler.heap);
        double logprob = (double)item.key - total, probability = exp(logprob);
        rest -= probability;
        if (s->o.json) {
            fputs(i ? ", " : "[", stdout);
            open_json(&s->t, item.index, pos, logprob);
            printf(", \"prob\": %.6g}", probability);
        } else {
            printf("%6.2f%% ", 100 * probability);
            print_bar(exp((double)(item.key - most)), smaller((terminal_columns() - 8) / 3, 40));
            putchar(' ');
            print_quoted(s->t.pieces[item.index].text, QUOTED);
            puts(s->t.pieces[item.index].type == CONTROL ? " (control)" : "");
        }
    }
    if (s->o.json)
        putchar(']');
    else
        printf("%6.2f%% rest\n", 100 * fmax(rest, 0));
}

// Makes ready for what is to be said.
static void begin(Session *s) {
    const Options *o = &s->o;
    const char *no_color = getenv("NO_COLOR"); // https://no-color.org
    s->state = open_state(&s->m, s->context, 1 + o->draft, o->threads);
    s->sampler = (Sampler){.temperature = o->temperature, .top_p = o->top_p, .top_k = o->top_k, .random = o->seed};
    s->sampler.kept = allocate(s->m.h.vocab_size, sizeof *s->sampler.kept, "sampling");
    s->sampler.probabilities = allocate(s->m.h.vocab_size, sizeof *s->sampler.probabilities, "sampling");
    s->terminal = isatty(STDOUT_FILENO);
    s->colours = o->probs && !o->json && s->terminal && !(no_color && *no_color);
    if (s->colours && isatty(STDERR_FILENO))
        print_legend();
}

// Says on standard error how fast it was.
static void print_speed(const Session *s) {
    double reading = s->reading > 0 ? (double)s->n_read / s->reading : 0;
    double saying = s->saying > 0 ? (double)s->n_after / s->saying : 0;
    fprintf(stderr, "\nprompt: %zu tokens, %.*f tok/s; then: %zu tokens, %.*f tok/s; seed %llu\n", s->n_read,
            reading < 10 ? 2 : 1, reading, s->n_said, saying < 10 ? 2 : 1, saying, (unsigned long long)s->o.seed);
    if (s->o.draft)
        fprintf(stderr, "guessed: %zu of %zu tokens\n", s->n_saved, s->n_after);
}

// Ctrl-C stops an answer of a chat; once more, before the next line is there, it leaves. The handler of a signal can
// reach nothing but a global variable, so this is one.
static volatile sig_atomic_t interrupts;

// Reads those tokens that the cache does not hold yet. Ctrl-C ends it after a batch.
static void read_on(Session *s) {
    for (size_t n; s->n_cached < n_tokens(s->tokens) && !interrupts; s->n_cached += n) {
        n = smaller(s->state.batch, n_tokens(s->tokens) - s->n_cached);
        feed(&s->m, &s->state, (uint32_t *)s->tokens.data + s->n_cached, n, s->n_cached);
    }
    s->n_guesses = s->n_right = 0;
}

// Where the text had the tokens that it ends with before, the place behind them: the last one where most of four are the
// same, and two at least; n if there is none.
static size_t find_same(const uint32_t *tokens, size_t n) {
    size_t place = n, most = 1;
    for (size_t i = n - 1; i > 0 && most < 4; i--) {
        size_t same = 0;
        while (same < smaller(i, 4) && tokens[i - 1 - same] == tokens[n - 1 - same])
            same++;
        place = same > most ? i : place;
        most = larger(most, same);
    }
    return place;
}

// Reads the token that was said last, and with it --draft guesses: what followed where the text had the same tokens
// before. A pass for a few tokens takes hardly longer than for one, and the bits of a token's logits do not depend on
// what it shares a pass with. So if a guess proves right, its logits are there, and are those that it would have
// alone; else they are forgotten, and its place in the cache is written anew.       (prompt lookup: Saxena 2023)
static void read_next(Session *s, bool guessed) {
    size_t n = n_tokens(s->tokens);
    if (guessed) {
        s->n_cached++;
        s->n_right++;
        s->n_saved++;
        check_finite(&s->m, logits_of(s), n - 1);
        return;
    }
    size_t most = smaller(smaller(s->o.draft, s->context - n), s->state.batch - 1);
    uint32_t *guesses = reserve(&s->tokens, most * sizeof *guesses), *tokens = s->tokens.data;
    size_t place = most ? find_same(tokens, n) : n;
    if (place == n || s->n_cached + 1 < n) {
        read_on(s);
        return;
    }
    for (size_t i = 0; i < most; i++)
        guesses[i] = tokens[place + i]; // the last of which may be guesses themselves
    feed_batch(&s->m, &s->state, tokens + n - 1, 1 + most, n - 1);
    classify(&s->m, &s->state, 0, 1 + most);
    check_finite(&s->m, s->state.logits, n - 1);
    s->n_cached = n;
    s->n_guesses = most;
    s->n_right = 0;
}

// Prints a token that the model has chosen: its text, in the colour of its probability; or with --json, an object.
static void print_token(Session *s, uint32_t token) {
    size_t pos = s->n_cached;
    bool asked = s->o.json || s->colours; // it costs as much as a layer of a small model
    double logprob = asked ? log_probability(logits_of(s), s->t.h.vocab_size, token) : 0;
    if (s->o.json) {
        open_json(&s->t, token, pos, logprob);
        fputs(s->o.probs ? ", \"top\": " : "", stdout);
        if (s->o.probs)
            print_likeliest(s, s->o.top_k ? s->o.top_k : 5, pos);
        puts("}");
    } else if (!is_stop(&s->t, token)) {
        stream_text(s, decode(&s->t, token, pos), s->colours ? colour_of(exp(logprob)) : 0, false);
    }
    flush_output();
}

static bool make_room(Session *s); // see chat

// Goes on after the tokens: to a stop, to `most` more (0: no limit), to Ctrl-C, or until there is no room. Returns
// whether it came to a stop.
static bool speak(Session *s, size_t most) {
    Turn *turn = s->turns.n ? (Turn *)s->turns.data + n_turns(s) - 1 : NULL;
    size_t cached = s->n_cached, made = 0;
    bool stopped = false;
    double start = seconds();
    read_on(s);
    double first = seconds();
    s->n_read += s->n_cached - cached;
    while (!interrupts) {
        uint32_t token = sample(&s->sampler, logits_of(s), s->t.h.vocab_size);
        print_token(s, token);
        made++;
        stopped = is_stop(&s->t, token);
        if (stopped)
            break;
        bool guessed = s->n_right < s->n_guesses && ((uint32_t *)s->tokens.data)[n_tokens(s->tokens)] == token;
        push_token(&s->tokens, token);
        if (turn)
            push_token(&turn->answer, token);
        if (made == most || !make_room(s))
            break;
        read_next(s, guessed);
        s->n_after++;
    }
    s->reading += first - start;
    s->saying += seconds() - first;
    s->n_said += made;
    stream_text(s, (Text){0}, 0, true);
    fputs(s->o.json ? "" : "\n", stdout);
    flush_output();
    return stopped;
}

// Prints the prompt and what follows: to -n tokens in all, to a stop, or to the end of the context. With --json, only
// what follows, an object a token.
static void generate(Session *s) {
    read_tokens(s, SIZE_MAX);
    if (s->tokens.n == 0 && s->t.h.bos_id >= 0) // an empty prompt: begin as texts began in training
        push_token(&s->tokens, (uint32_t)s->t.h.bos_id);
    expect(s->tokens.n, "an empty prompt: expected text (-i or -f), as %s has no bos token", s->t.path);
    const size_t n = n_tokens(s->tokens), context = s->context, bos = *(int32_t *)s->tokens.data == s->t.h.bos_id;
    const size_t end = s->o.steps ? s->o.steps + bos : SIZE_MAX; // tokens in all; the last of them is not read
    expect(n <= context, "the prompt: expected at most %zu tokens (the context, -c), found %zu", context, n);
    expect(n < end, "the prompt: expected fewer than %zu tokens (-n; 0 fills the context), found %zu", end - bos,
           n - bos);
    s->context = smaller(context, end - 1);
    begin(s);
    for (size_t i = 0; i < n && !s->o.json; i++)
        stream_text(s, decode(&s->t, ((uint32_t *)s->tokens.data)[i], i), 0, false);
    flush_output();
    bool stopped = speak(s, s->context - n + 1);
    if (!stopped && end > context + 1)
        fprintf(stderr, "run: the context of %zu tokens is full\n", context);
    print_speed(s);
}

static void expect_text(const Options *o) {
    if (!o->prompt && !o->prompt_file)
        die(USAGE, "-m %s: expected a text, -i or -f", o->mode);
}

// A window on a text starts with bos too.
static void begin_with_bos(Session *s) {
    if (s->t.h.flags & ADD_BOS)
        *(uint32_t *)s->tokens.data = (uint32_t)s->t.h.bos_id;
}

// Shows what may come after the prompt, of which it takes the end if it is longer than the context.
static void next(Session *s) {
    expect_text(&s->o);
    read_tokens(s, SIZE_MAX);
    size_t all = n_tokens(s->tokens), n = smaller(all, s->context), k = s->o.top_k ? s->o.top_k : 10;
    expect(all > 0, "the text is too short: expected at least 1 token, bos included, found 0");
    if (n < all) {
        cut_front(&s->tokens, (all - n) * sizeof(uint32_t));
        begin_with_bos(s);
        fprintf(stderr, "run: of %zu tokens, the last %zu fit the context\n", all, n);
    }
    s->state = open_state(&s->m, n, 1, s->o.threads);
    feed(&s->m, &s->state, s->tokens.data, n, 0);
    const float *logits = s->state.logits;
    double total = log_sum(logits, s->m.h.vocab_size), entropy = 0;
    for (size_t i = 0; i < s->m.h.vocab_size; i++)
        entropy += exp((double)logits[i] - total) * (total - (double)logits[i]) / log(2);
    if (s->o.json)
        printf("{\"tokens\": %zu, \"entropy_bits\": %.6f, \"next\": ", n, entropy);
    print_likeliest(s, k, all);
    if (s->o.json)
        puts("}");
    else
        printf("entropy %.2f bits\n", entropy);
}

enum { SCORED_AT_ONCE = 32 }; // tokens whose logits are in memory

// Feeds a window, the first n tokens, and works out what those from `first` on cost, in nats: cost (n).
static void score_window(Session *s, double *cost, size_t n, size_t first) {
    const uint32_t *tokens = s->tokens.data;
    const float *logits = s->state.logits;
    size_t vocab = s->m.h.vocab_size;
    for (size_t at = 0, T; at + 1 < n; at += T) { // nothing comes after the last one
        T = smaller(s->state.batch, n - 1 - at);
        feed_batch(&s->m, &s->state, tokens + at, T, at);
        for (size_t i = larger(at + 1, first), count; i <= at + T; i += count) {
            count = smaller(SCORED_AT_ONCE, at + T + 1 - i);
            classify(&s->m, &s->state, i - 1 - at, count); // a token's score is in the logits before it
            for (size_t j = 0; j < count; j++)
                check_finite(&s->m, logits + j * vocab, i + j - 1);
#pragma omp parallel for num_threads((int)s->state.threads)
            for (size_t j = 0; j < count; j++)
                cost[i + j] = -log_probability(logits + j * vocab, vocab, tokens[i + j]);
        }
    }
}

// How well the model predicts a text, in windows of the context's length. Each overlaps the one before by a token, in
// whose place is bos, if the tokenizer begins texts with it; so each token is scored once, but the text's first. With
// --stride N, windows start N tokens apart, nothing is replaced, and each scores what the ones before have not.
static void perplexity(Session *s) {
    size_t context = s->context;
    if (context < 2)
        die(USAGE, "-c: perplexity expected at least 2, found %zu", context);
    if (s->o.stride > context)
        die(USAGE, "--stride: expected at most %zu, the context, found %zu", context, (size_t)s->o.stride);
    expect_text(&s->o);
    read_tokens(s, context);
    context = smaller(context, n_tokens(s->tokens));
    expect(context >= 2, "the text is too short: expected at least 2 tokens, bos included, found %zu", context);
    size_t stride = smaller(s->o.stride ? s->o.stride : context - 1, context);
    s->state = open_state(&s->m, context, SCORED_AT_ONCE, s->o.threads);
    double *cost = allocate(context, sizeof *cost, "the costs of a window");
    double sum = 0, squares = 0, count = 0, bytes = 0, start = seconds();
    size_t n = context, begins = 0, first = 1; // of a window: its tokens, its position, and the first one to score
    while (n == context) {
        read_tokens(s, context + stride); // so that there is one left when this window is done
        n = smaller(context, n_tokens(s->tokens));
        if (!s->o.stride && n > 0)
            begin_with_bos(s);
        score_window(s, cost, n, first);
        for (size_t i = first; i < n; i++) {
            count++;
            sum += cost[i];
            squares += cost[i] * cost[i];
            bytes += (double)decode(&s->t, ((uint32_t *)s->tokens.data)[i], begins + i).n;
        }
        if (isatty(STDERR_FILENO))
            fprintf(stderr, "\r%zu tokens%s", begins + n, n == context ? "" : "\n");
        first = larger(n, stride + 1) - stride; // nothing comes before a window's first token
        cut_front(&s->tokens, n == context ? stride * sizeof(uint32_t) : 0);
        begins += stride;
    }
    free(cost);
    double speed = count / (seconds() - start), nll = sum / count, bits = sum / log(2) / fmax(bytes, 1);
    double variance = (squares / count - nll * nll) * count / fmax(count - 1, 1);
    // exp is its own slope, so (by the delta method) this times the error of nll is the error; JSON has no infinity
    double result = fmin(exp(nll), DBL_MAX), error = fmin(result * sqrt(fmax(variance, 0) / count), DBL_MAX);
    printf(s->o.json
               ? "{\"tokens\": %.0f, \"nll\": %.9g, \"perplexity\": %.9g, \"stderr\": %.6g, \"bits_per_byte\": %.9g, "
                 "\"tok_s\": %.6g}\n"
               : "tokens         %.0f\nnll            %.5f nats a token\nperplexity     %.5g +- %.2g\n"
                 "bits per byte  %.5f\nspeed          %.1f tok/s\n",
           count, nll, result, error, bits, speed);
}

static void add_template(Session *s, size_t which) {
    Text items = s->t.templates[which], text;
    for (File f = {s->t.path, items.bytes, items.n, 0, -1}; f.at < f.n;) {
        uint32_t token = next_item(&f, &text);
        append(&s->text, text.bytes, text.n);
        if (token != NONE) {
            end_text(s);
            push_token(&s->tokens, token);
        }
    }
}

// Whose ends a template may trim, by two bits of its flags from bit 2 on
typedef enum { SYSTEM_TEXT, FIRST_AFTER_SYSTEM, OTHER_TEXT } Speaker;

// What someone says, which is only ever text.
static void add_text(Session *s, Text text, Speaker speaker) {
    uint32_t flags = s->t.h.template_flags >> (2 + 2 * speaker);
    for (; flags & 1 && text.n && is_space(*text.bytes); text.n--)
        text.bytes++;
    while (flags & 2 && text.n && is_space(text.bytes[text.n - 1]))
        text.n--;
    append(&s->text, text.bytes, text.n);
}

// Writes the script of all turns that are not forgotten. Where it begins as before, the cache holds it still.
static void write_script(Session *s) {
    const char *system = s->o.system;
    const Turn *turns = s->turns.data;
    const Buffer old = s->tokens;
    s->tokens = (Buffer){0};
    add_template(s, system ? BEFORE_SYSTEM : BEFORE_USER);
    if (system) {
        add_text(s, text_of(system), SYSTEM_TEXT);
        add_template(s, AFTER_SYSTEM);
    }
    for (size_t i = s->first_turn; i < n_turns(s); i++) {
        if (i > s->first_turn) {
            add_template(s, AFTER_ANSWER);
            add_template(s, NEXT_USER);
        }
        Text said = {turns[i].said.data, turns[i].said.n};
        add_text(s, said, system && i == s->first_turn ? FIRST_AFTER_SYSTEM : OTHER_TEXT);
        add_template(s, AFTER_USER);
        end_text(s);
        append(&s->tokens, turns[i].answer.data, turns[i].answer.n);
    }
    expect(s->tokens.n, "an empty message: expected text, as the template of %s has none", s->t.path);
    size_t same = 0, most = smaller(s->n_cached, n_tokens(s->tokens) - 1); // the last gives the logits
    while (same < most && ((uint32_t *)old.data)[same] == ((uint32_t *)s->tokens.data)[same])
        same++;
    s->n_cached = same;
    free(old.data);
}

// When the script is longer than the context, forgets the oldest turns until half of it is free. Returns whether
// there is room now; if not even the last turn fits, nothing is forgotten.
static bool make_room(Session *s) {
    size_t before = s->first_turn;
    if (n_tokens(s->tokens) <= s->context)
        return true;
    bool speaking = ((Turn *)s->turns.data)[n_turns(s) - 1].answer.n;
    fprintf(stderr, "%srun: the context of %zu tokens is full: ", s->terminal && speaking ? "\n" : "", s->context);
    while (s->first_turn + 1 < n_turns(s) && n_tokens(s->tokens) > s->context / 2) {
        s->first_turn++;
        write_script(s);
    }
    bool room = n_tokens(s->tokens) <= s->context;
    if (room)
        fprintf(stderr, "the oldest turns (%zu) are forgotten, the rest is read again\n", s->first_turn - before);
    else
        fprintf(stderr, "this message and its answer alone take %zu\n", n_tokens(s->tokens));
    s->first_turn = room ? s->first_turn : before;
    return room;
}

// Says the answer to a message: to a stop, to -n tokens, to Ctrl-C, or to the end of the context, if there is nothing
// more to forget. With --json, that is an object with what the model reads, then one for each token.
static void answer(Session *s, Text message) {
    Turn turn = {0};
    append(&turn.said, message.bytes, message.n);
    append(&s->turns, &turn, sizeof turn);
    write_script(s);
    bool room = make_room(s);
    if (s->o.json) {
        printf("{\"cached\": %zu, \"prompt_tokens\": [", s->n_cached);
        print_ids(s->tokens, ", ");
        puts("]}");
    }
    s->skip_space = true; // in front of an answer, it belongs to the template
    if (room) {
        speak(s, s->o.steps);
    } else { // the message is too long
        fputs(s->o.json ? "" : "\n", stdout);
        s->turns.n -= sizeof turn;
        free(turn.said.data);
    }
}

// The end for the handler of a signal, which may do little else.
static _Noreturn void leave(int status, const char *message) {
    ssize_t written = write(STDERR_FILENO, message, strlen(message));
    (void)written;
    _exit(status);
}

static void count_interrupt(int signal) {
    (void)signal;
    if (interrupts++)
        leave(INTERRUPTED, "\n");
}

// With SA_RESTART, the signal disturbs no output; without, it ends the wait for a line.
static void catch_interrupts(int flags) {
    struct sigaction action = {.sa_handler = count_interrupt, .sa_flags = flags};
    sigaction(SIGINT, &action, NULL);
}

// Reads the next line and returns its length, without its end; -1 at the end of the input.
static ssize_t read_line(Session *s, bool terminal) {
    catch_interrupts(0);
    fputs(terminal ? "> " : "", stderr);
    errno = 0;
    ssize_t n = getline(&s->line, &s->capacity, s->input);
    catch_interrupts(SA_RESTART);
    if (n < 0 && errno == EINTR) {
        clearerr(s->input);
        fputs(terminal ? "\n(Ctrl-C again, or Ctrl-D, leaves)\n" : "", stderr);
        return read_line(s, terminal);
    }
    expect(n >= 0 || feof(s->input), "cannot read what is said: %s", strerror(errno));
    interrupts = 0;
    fputs(terminal && n > 0 && s->line[n - 1] != '\n' ? "\n" : "", stderr); // Ctrl-D ends a line, too
    while (n > 0 && (s->line[n - 1] == '\n' || s->line[n - 1] == '\r'))
        n--;
    return n;
}

// Answers -i, then each line of the terminal, of standard input, or of -f.
static void chat(Session *s) {
    expect(s->t.h.template_flags & HAS_TEMPLATE,
           "%s: -m chat: expected a chat template, found none: export.py found none, or none that it can take apart",
           s->t.path);
    expect(!s->o.system || s->t.h.template_flags & HAS_SYSTEM, "%s: -y: its chat template takes no system text",
           s->t.path);
    s->t.h.flags &= ~(uint32_t)ADD_BOS; // that is in the template
    begin(s);
    bool terminal = isatty(fileno(s->input)) && isatty(STDERR_FILENO);
    catch_interrupts(SA_RESTART);
    if (s->o.prompt)
        answer(s, text_of(s->o.prompt));
    for (ssize_t n; (n = read_line(s, terminal)) >= 0;)
        if (n || !terminal)
            answer(s, (Text){(unsigned char *)s->line, (size_t)n});
    print_speed(s);
}

// Bytes a second of a plain read of the whole weights file: generation reads nearly all of it for each token.
static double read_speed(const Session *s) {
    const uint64_t *words = (const void *)s->m.file.bytes;
    uint64_t sum = 0;
    double start = seconds();
#pragma omp parallel for num_threads((int)s->o.threads) reduction(+ : sum)
    for (size_t i = 0; i < s->m.file.n / sizeof *words; i++)
        sum += words[i];
    __asm__ volatile("" : : "r"(sum)); // or the compiler would leave out the loop
    return (double)s->m.file.n / (seconds() - start);
}

// Floating-point operations a second of the instruction that a prompt's matrix products are made of.
static double multiply_speed(const Session *s) {
    double operations = 0, start = seconds();
#pragma omp parallel num_threads((int)s->o.threads) reduction(+ : operations)
    operations += multiply_only(s->state.input_type == BF16, 400000);
    return operations / (seconds() - start);
}

enum { MAX_REPEAT = 100 };

// A kind of work, measured several times.
typedef struct {
    const char *name;
    size_t tokens, pos, step;             // so many tokens from this position on, so many at a time
    double work;                          // a token's floating-point operations, or the bytes that it reads
    double (*limit_of)(const Session *s); // the most of such work that the machine does in a second
    double speed[MAX_REPEAT], limit[MAX_REPEAT], share[MAX_REPEAT]; // tokens a second; that limit; how near to it
} Measurement;

// The limit changes from minute to minute on many machines, so it is measured between the steps.
static void measure(Session *s, Measurement *r, size_t i) {
    double limits = r->limit_of(s), n_limits = 1, working = 0;
    for (size_t t = 0; t < r->tokens; t += r->step, n_limits++) {
        double start = seconds();
        feed(&s->m, &s->state, (uint32_t *)s->tokens.data + t, r->step, r->pos + t);
        working += seconds() - start;
        limits += r->limit_of(s);
    }
    r->speed[i] = (double)r->tokens / working;
    r->limit[i] = limits / n_limits;
    r->share[i] = r->speed[i] * r->work / r->limit[i];
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_measurement(Measurement *r, size_t n, bool json) {
    double *samples[] = {r->speed, r->limit, r->share};
    for (size_t i = 0; i < 3; i++)
        qsort(samples[i], n, sizeof(double), ascending);
    bool reads = r->limit_of == read_speed;
    const char *rate = json ? reads ? "gb_s" : "gflops" : reads ? "GB/s" : "GFLOPS";
    const char *limit = json ? reads ? "read_gb_s" : "peak_gflops" : rate;
    double speed = r->speed[n / 2];
    printf(json ? ", \"%s\": {\"tokens\": %zu, \"position\": %zu, \"tok_s\": %.6g, \"tok_s_min\": %.6g, "
                  "\"tok_s_max\": %.6g, \"%s\": %.6g, \"%s\": %.6g, \"ratio\": %.4f}"
                : "| %-13s | %6zu | %8zu | %9.2f | %9.2f | %9.2f | %-6s %7.1f | %-6s %7.1f | %5.2f |\n",
           r->name, r->tokens, r->pos, speed, r->speed[0], r->speed[n - 1], rate, speed * r->work / 1e9, limit,
           r->limit[n / 2] / 1e9, r->share[n / 2]);
}

// Measures a prompt, and generation at the start and at the end of the context.
static void bench(Session *s) {
    const Model *m = &s->m;
    const Header *h = &m->h;
    size_t context = s->o.context ? s->context : smaller(s->context, 4096), n = s->o.repeat;
    size_t prefill = s->o.prefill ? s->o.prefill : smaller(512, context);
    size_t decode = s->o.decode ? s->o.decode : smaller(64, context), tail = context - decode;
    if (larger(prefill, decode) > context)
        die(USAGE, "--prefill, --decode: expected at most the context of %zu tokens, found %zu", context,
            larger(prefill, decode));
    s->state = open_state(m, context, 1, s->o.threads);
    uint64_t random = 0;
    for (uint16_t *kv = s->state.k; kv < s->state.v + (s->state.v - s->state.k); kv++) {
        const float value = (float)random_number(&random) - 0.5f;
        narrow(kv, s->state.kv_type, &value, 1); // as if there had been tokens at all positions
    }
    for (size_t i = 0; i < context; i++)
        push_token(&s->tokens, (uint32_t)(random_number(&random) * h->vocab_size));

    // A product of n weights takes 2n operations. Attention multiplies each query with the keys, and the scores with
    // the values, of the positions so far.
    double T = (double)prefill, layers = h->n_layers, embedding = (double)h->vocab_size * h->dim;
    double operations =
        2 * layers * (double)layer_weights(m) + 2 * embedding / T + layers * 4 * (double)m->q_dim * (T + 1) / 2;
    double weights = (double)m->file.n - (h->flags & TIED ? 0 : 2 * embedding);
    double cached = 2 * cache_bytes(m, context) / (double)s->state.context; // for a position
    double first = weights + cached * ((double)decode + 1) / 2, last = first + cached * (double)tail;
    Measurement all[] = {
        {.name = "prefill", .tokens = prefill, .step = prefill, .work = operations, .limit_of = multiply_speed},
        {.name = "decode", .tokens = decode, .step = 1, .work = first, .limit_of = read_speed},
        {.name = "decode_at_end", .tokens = decode, .pos = tail, .step = 1, .work = last, .limit_of = read_speed},
    };
    enum { KINDS = sizeof all / sizeof *all };
    read_speed(s); // the pages that are not in memory yet
    feed(m, &s->state, s->tokens.data, smaller(prefill, 16), 0);
    for (size_t i = 0; i < n; i++)
        for (size_t kind = 0; kind < KINDS; kind++)
            measure(s, &all[kind], i);

    Text logits = {(const unsigned char *)s->state.logits, h->vocab_size * sizeof(float)};
    fputs(s->o.json ? "{\"model\": " : "", stdout);
    print_quoted(text_of(m->file.path), JSON);
    printf(s->o.json ? ", \"params\": %zu, \"dtype\": \"%s\", \"file_bytes\": %zu, \"isa\": \"%s\", \"threads\": %zu, "
                       "\"context\": %zu, \"repeat\": %zu, \"logits_hash\": \"%016llx\""
                     : ": %zu parameters in %s, %zu bytes; %s; threads: %zu; context: %zu; median of %zu; logits "
                       "%016llx\n\n"
                       "| work          | tokens | position |     tok/s |       min |       max |           rate |"
                       "          limit | share |\n"
                       "|---------------|-------:|---------:|----------:|----------:|----------:|---------------:|"
                       "---------------:|------:|\n",
           (m->file.n - HEADER_SPACE) / 2, h->dtype == BF16 ? "bf16" : "f16", m->file.n, isa(), (size_t)s->o.threads,
           context, n, (unsigned long long)hash_of(logits));
    for (size_t kind = 0; kind < KINDS; kind++)
        print_measurement(&all[kind], n, s->o.json);
    fputs(s->o.json ? "}\n" : "", stdout);
}

// ------------------------------------------------------------------------------------------------
// 7 The command line

// Hyper-threads of a core share its arithmetic and its path to memory, so one thread a core is best.
static unsigned physical_cores(void) {
#ifdef __linux__
    cpu_set_t allowed, cores; // a core goes by the number of its first hyper-thread
    CPU_ZERO(&cores);
    if (sched_getaffinity(0, sizeof allowed, &allowed))
        return 1;
    for (size_t cpu = 0, first; cpu < CPU_SETSIZE; cpu++) {
        char path[96];
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%zu/topology/thread_siblings_list", cpu);
        FILE *file = CPU_ISSET(cpu, &allowed) ? fopen(path, "r") : NULL;
        if (CPU_ISSET(cpu, &allowed))
            CPU_SET(file && fscanf(file, "%zu", &first) == 1 ? first : cpu, &cores);
        if (file)
            fclose(file);
    }
    return (unsigned)CPU_COUNT(&cores);
#else
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    return cores > 0 ? (unsigned)cores : 1;
#endif
}

typedef struct {
    const char *name;
    void (*run)(Session *s);
} Mode;

static const Mode *find_mode(const char *name) {
    static const Mode modes[] = {{"generate", generate},     {"chat", chat},         {"next", next},
                                 {"perplexity", perplexity}, {"tokenize", tokenize}, {"bench", bench}};
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++)
        if (!strcmp(name, modes[i].name))
            return &modes[i];
    die(USAGE, "-m: expected generate, chat, next, perplexity, tokenize or bench, found '%s'", name);
}

typedef struct {
    const char *flag;
    enum { TEXT, NUMBER, INTEGER, SWITCH } kind;
    void *target; // const char *, float, uint64_t, bool
    long long min, max;
    const char *value, *help;
} Option;

static void set_option(const Option *option, const char *text) {
    char *end = NULL;
    bool good = true;
    if (option->kind == TEXT) {
        *(const char **)option->target = text;
    } else if (option->kind == NUMBER) {
        float value = *(float *)option->target = strtof(text, &end);
        good = value >= (float)option->min && value <= (float)option->max;
    } else if (option->kind == INTEGER) {
        errno = 0;
        long long value = strtoll(text, &end, 10);
        good = !errno && value >= option->min && value <= option->max;
        *(uint64_t *)option->target = (uint64_t)value;
    }
    if (!good || (end && (end == text || *end)))
        die(USAGE, "%s: expected a %s from %lld to %lld, found '%s'", option->flag,
            option->kind == INTEGER ? "whole number" : "number", option->min, option->max, text);
}

#define NEXT_LINE "\n              " // in what --help says of a flag

static Options parse_options(int argc, char **argv) {
    Options o = {.mode = "generate", .temperature = 1.0f, .top_p = 0.9f, .steps = UINT64_MAX, .repeat = 5};
    o.threads = physical_cores();
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    o.seed = (uint64_t)(now.tv_sec ^ now.tv_nsec);
    bool help = false, version = false;
    const Option options[] = {
        {"-m", TEXT, &o.mode, 0, 0, "MODE",
         "generate (default): go on with the prompt; chat: answer each line;" NEXT_LINE
         "next: what may come next; perplexity: rate a text;" NEXT_LINE
         "bench: measure the speed; tokenize: print token ids"},
        {"-i", TEXT, &o.prompt, 0, 0, "TEXT", "the prompt"},
        {"-f", TEXT, &o.prompt_file, 0, 0, "FILE", "the prompt from a file; -: from standard input"},
        {"-y", TEXT, &o.system, 0, 0, "TEXT", "chat: the system text, which says how to answer"},
        {"-n", INTEGER, &o.steps, 0, INT32_MAX, "N",
         "stop after N tokens, the prompt too (256; 0: the context's end);" NEXT_LINE
         "chat: N tokens of an answer (0: when the model stops)"},
        {"-t", NUMBER, &o.temperature, 0, 1000000, "T", "temperature (1.0; 0: always the likeliest token)"},
        {"-p", NUMBER, &o.top_p, 0, 1, "P", "top-p: from the likeliest that have P together (0.9; 1: off)"},
        {"-k", INTEGER, &o.top_k, 0, INT32_MAX, "K", "top-k: from the K likeliest (0: off); next: that many (10)"},
        {"-s", INTEGER, &o.seed, 0, INT64_MAX, "SEED", "the same seed gives the same text (the time)"},
        {"-c", INTEGER, &o.context, 1, INT32_MAX, "N", "context, in tokens (the model's)"},
        {"-j", INTEGER, &o.threads, 1, 1024, "N", "threads (physical cores)"},
        {"-z", TEXT, &o.tokenizer, 0, 0, "FILE", "tokenizer (MODEL.tokenizer.bin, tokenizer.bin beside it or here)"},
        {"--probs", SWITCH, &o.probs, 0, 0, "", "colour each token by its probability; with --json: the top K (5)"},
        {"--json", SWITCH, &o.json, 0, 0, "", "JSON: an object a token, or one for all"},
        {"--draft", INTEGER, &o.draft, 0, MAX_DRAFT, "N",
         "read up to N guesses with each token: the same text, sooner (0)"},
        {"--stride", INTEGER, &o.stride, 1, INT32_MAX, "N", "perplexity: windows N apart, each rates its last N"},
        {"--prefill", INTEGER, &o.prefill, 1, INT32_MAX, "N",
         "bench: tokens of a prompt (512); --decode N: generated (64)"},
        {"--decode", INTEGER, &o.decode, 1, INT32_MAX, "", NULL},
        {"--repeat", INTEGER, &o.repeat, 1, MAX_REPEAT, "N", "bench: how often (5)"},
        {"-h", SWITCH, &help, 0, 0, "", NULL},
        {"--help", SWITCH, &help, 0, 0, "", "this, as -h; --version: the version"},
        {"--version", SWITCH, &version, 0, 0, "", NULL},
    };
    const Option *end = options + sizeof options / sizeof *options;
    for (int i = 1; i < argc; i++) {
        const Option *option = options;
        while (option < end && strcmp(argv[i], option->flag))
            option++;
        if (*argv[i] != '-') {
            if (o.model)
                die(USAGE, "expected one MODEL, found '%s' and '%s'", o.model, argv[i]);
            o.model = argv[i];
        } else if (option == end) {
            die(USAGE, "unknown flag '%s'", argv[i]);
        } else if (option->kind == SWITCH) {
            *(bool *)option->target = true;
        } else if (++i == argc) {
            die(USAGE, "%s: expected a value, found the end of the command line", option->flag);
        } else {
            set_option(option, argv[i]);
        }
    }
    if (help) {
        puts("usage: run [MODEL] [options]     MODEL: a weights file (" DEFAULT_MODEL ")");
        for (const Option *option = options; option < end; option++)
            if (option->help)
                printf("  %s %-*s %s\n", option->flag, 10 - (int)strlen(option->flag), option->value, option->help);
    } else if (version) {
        printf("twofiles %s (%s)\n", VERSION, isa());
    }
    if (help || version) {
        flush_output();
        exit(0);
    }
    if (o.prompt && o.prompt_file && strcmp(o.mode, "chat"))
        die(USAGE, "expected one of -i and -f, found both");
    if (o.steps == UINT64_MAX) // no -n
        o.steps = strcmp(o.mode, "chat") ? 256 : 0;
    return o;
}

// The length of a path without .bin at its end.
static int stem(const char *path) {
    size_t n = strlen(path);
    return (int)(n >= 4 && !strcmp(path + n - 4, ".bin") ? n - 4 : n);
}

// The length of a path's folder, with the / at its end.
static int folder(const char *path) {
    const char *slash = strrchr(path, '/');
    return (int)(slash ? slash + 1 - path : 0);
}

// The tokenizer file: -z FILE, else MODEL.tokenizer.bin beside MODEL.bin, else tokenizer.bin beside it, else here. If
// MODEL is a link, beside it and beside what it leads to.
static const char *tokenizer_path(const Options *o) {
    if (o->tokenizer)
        return o->tokenizer;
    char target[PATH_MAX];
    const char *names[] = {o->model, realpath(o->model, target) ? target : o->model};
    size_t size = larger(strlen(names[0]), strlen(names[1])) + sizeof ".tokenizer.bin";
    char *path = allocate(size, 1, "a path");
    for (size_t i = 0; i < 5; i++) {
        const char *name = names[i % 2];
        if (i < 2)
            snprintf(path, size, "%.*s.tokenizer.bin", stem(name), name);
        else
            snprintf(path, size, "%.*stokenizer.bin", i < 4 ? folder(name) : 0, name);
        if (!access(path, F_OK))
            return path;
    }
    die(CANNOT, "%s: no tokenizer file: expected %.*s.tokenizer.bin, or tokenizer.bin beside it or here, or -z FILE",
        o->model, stem(o->model), o->model);
}

static void check_pair(const Model *m, const Tokenizer *t) {
    expect(m->h.vocab_size == t->h.vocab_size,
           "%s: the wrong tokenizer for %s (-z names another): expected %u tokens, found %u", t->path, m->file.path,
           m->h.vocab_size, t->h.vocab_size);
    expect(m->h.vocab_hash == t->h.vocab_hash,
           "%s: the wrong tokenizer for %s: expected a vocabulary with the hash %016llx, found %016llx", t->path,
           m->file.path, (unsigned long long)m->h.vocab_hash, (unsigned long long)t->h.vocab_hash);
}

#ifndef NO_MAIN // the tests include this file and have a main of their own
// OpenMP's threads wait for each other by spinning, by default for many milliseconds. Where another program has one of
// the cores, that keeps the thread that is waited for from running, so make it short. OpenMP looks at its settings when
// the program starts, hence the new start.
static void spin_briefly(char **argv) {
#if defined(_OPENMP) && defined(__linux__)
    if (!getenv("GOMP_SPINCOUNT") && !getenv("OMP_WAIT_POLICY") && !setenv("GOMP_SPINCOUNT", "3000", 1))
        execv("/proc/self/exe", argv);
#endif
    (void)argv; // if that fails, so be it
}

// A page of a mapped file cannot be had: its disk failed, or another program made the file shorter.
static void end_at_lost_page(int signal) {
    (void)signal;
    leave(CANNOT,
          "run: the weights or the tokenizer: expected the bytes that were there when the file was opened, found "
          "none: it was made shorter, or its disk fails\n");
}

int main(int argc, char **argv) {
    // A standard stream that is closed stays one that fails; else the next file opened would be taken for it.
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (fcntl(fd, F_GETFD) < 0)
            open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY);
    spin_briefly(argv);
    sigaction(SIGBUS, &(struct sigaction){.sa_handler = end_at_lost_page}, NULL);
    Session s = {.o = parse_options(argc, argv)};
    const Mode *mode = find_mode(s.o.mode);
    if (!s.o.model && !(mode->run == tokenize && s.o.tokenizer)) // to tokenize, that is enough
        s.o.model = DEFAULT_MODEL;
    if (s.o.model) {
        s.m = open_model(s.o.model);
        uint32_t most = s.m.h.max_seq_len;
        s.context = s.o.context ? s.o.context : most;
        if (s.context > most)
            die(USAGE, "-c: expected at most %u, the context of %s, found %zu", most, s.o.model, s.context);
        s.o.threads = smaller(s.o.threads, useful_threads(&s.m));
    }
    s.t = open_tokenizer(tokenizer_path(&s.o));
    if (s.o.model)
        check_pair(&s.m, &s.t);
    s.input = open_input(&s.o);
    mode->run(&s);
    flush_output();
    exit(0); // no return: to the end, what s points to is in use, and so is no leak
}
#endif

// ------------------------------------------------------------------------------------------------
// 8 Appendix: SIMD
//
// An instruction set is a handful of inlines over vectors of W floats. The inner loops are written once, over them.
// A sum is made by CHAINS accumulators of W lanes: number j takes the vectors j, j + CHAINS, ... of the operands. A
// chain of dependent additions is slow, so a tile of few sums works on all of them at a time; one of many sums takes
// the accumulators one after the other. The sums are the same, bit for bit.

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512DQ__)

#include <immintrin.h>
#define ISA "AVX-512"
enum { W = 16, CHAINS = 1, PAIR_CHAINS = 1, GROUP = 6, COLUMNS = 4 };
typedef __m512 vec;
INLINE vec load_bf16(const uint16_t *p) {
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}
INLINE vec load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vec multiply_add(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE __m128 sum4(vec a, vec b, vec c, vec d) {
    __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    vec all = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)) + _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AMX_BF16__) && defined(__linux__)
#define TILES
#define BF16_DOT "AMX BF16"
#elif defined(__AVX512BF16__)
#define BF16_DOT "AVX-512 BF16"
#endif
#ifdef __AVX512BF16__
INLINE vec multiply_add_pairs(vec a, vec b, vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
#endif

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>
#define ISA "AVX2"
enum { W = 8, CHAINS = 4, PAIR_CHAINS = 1, GROUP = 3, COLUMNS = 2 };
typedef __m256 vec;
INLINE vec load_bf16(const uint16_t *p) {
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}
INLINE vec load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE vec multiply_add(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE __m128 sum4(vec a, vec b, vec c, vec d) {
    __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

#elif defined(__ARM_NEON) && defined(__aarch64__)

#include <arm_neon.h>
#define ISA "NEON"
enum { W = 4, CHAINS = 4, PAIR_CHAINS = 4, GROUP = 6, COLUMNS = 4 };
typedef float32x4_t vec;
INLINE vec load_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
INLINE vec load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INLINE vec multiply_add(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
INLINE vec sum4(vec a, vec b, vec c, vec d) { return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)); }
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#define BF16_DOT "NEON BF16"
INLINE vec multiply_add_pairs(vec a, vec b, vec c) {
    return vbfdotq_f32(c, vreinterpretq_bf16_f32(a), vreinterpretq_bf16_f32(b));
}
#endif

#else // any other CPU: the compiler's own vectors

#define ISA "portable"
enum { W = 4, CHAINS = 4, PAIR_CHAINS = 1, GROUP = 3, COLUMNS = 2 };
typedef float vec __attribute__((vector_size(16)));
INLINE vec load_bf16(const uint16_t *p) {
    return (vec){bf16_to_f32(p[0]), bf16_to_f32(p[1]), bf16_to_f32(p[2]), bf16_to_f32(p[3])};
}
INLINE vec load_f16(const uint16_t *p) {
    return (vec){f16_to_f32(p[0]), f16_to_f32(p[1]), f16_to_f32(p[2]), f16_to_f32(p[3])};
}
INLINE vec multiply_add(vec a, vec b, vec c) { return a * b + c; }
INLINE vec sum4(vec a, vec b, vec c, vec d) {
    return (vec){a[0] + a[1], b[0] + b[1], c[0] + c[1], d[0] + d[1]} +
           (vec){a[2] + a[3], b[2] + b[3], c[2] + c[3], d[2] + d[3]};
}

#endif

static size_t some_tokens(void) { return TILE_ROWS * GROUP; }

#ifdef BF16_DOT
static bool has_bf16_dot(void) { return true; }
static const char *isa(void) { return BF16_DOT; }
#else
INLINE vec multiply_add_pairs(vec a, vec b, vec c) { return multiply_add(a, b, c); } // is never called
static bool has_bf16_dot(void) { return false; }
static const char *isa(void) { return ISA; }
#endif

// How many bytes ahead one token's weights are fetched, and into which cache, 3 being the innermost: what was fastest on
// Zen 5, which is known by its AVX-VNNI, and on Zen 4 and Xeons.
#if defined(__AVXVNNI__) && !defined(TILES)
enum { AHEAD = 4096, NEARNESS = 3 };
#else
enum { AHEAD = 3072, NEARNESS = 2 };
#endif

// What gcc and clang can say for vectors of any length.
typedef uint32_t vec_u32 __attribute__((vector_size(4 * W)));
typedef float float4 __attribute__((vector_size(16)));

INLINE vec fill(uint32_t bits) { return (vec)(bits + (vec_u32){0}); } // with a float, or a pair

INLINE vec load_f32(const void *p) {
    vec a;
    memcpy(&a, p, sizeof a);
    return a;
}

INLINE void store(float *p, vec a) { memcpy(p, &a, sizeof a); }

// Elements i, i + 1, ... of an array: W of them as f32, or 2W in bf16 as they are, for an instruction that multiplies
// and adds them in pairs.
INLINE vec load(const void *array, Dtype dtype, bool pairs, size_t i) {
    const void *p = address(array, dtype, i);
    return pairs || dtype == F32 ? load_f32(p) : dtype == BF16 ? load_bf16(p) : load_f16(p);
}

// gcc would rather load an operand anew for each multiplication, from memory, than once into a register. That is slow.
INLINE vec in_register(vec a) {
#if defined(__x86_64__)
    __asm__("" : "+v"(a));
#endif
    return a;
}

INLINE vec accumulate(vec a, vec b, vec sum, bool pairs) {
    return pairs ? multiply_add_pairs(a, b, sum) : multiply_add(a, b, sum);
}

_Static_assert(TILE_ROWS == 4, "sum4 adds up the four rows of a tile");
_Static_assert(CHAINS >= PAIR_CHAINS, "an array of CHAINS has room for either");

// out[0 to 3] = the sums over the lanes of four vectors, or += them
INLINE void put4(float *out, vec a, vec b, vec c, vec d, bool add) {
    float4 sums = (float4)sum4(a, b, c, d), before = {0};
    if (add)
        memcpy(&before, out, sizeof before);
    sums += before;
    memcpy(out, &sums, sizeof sums);
}

// What is fetched from memory while a tile is in work.
typedef struct {
    const char *next, *end;
    size_t lines; // of the cache, at a time
} Fetch;

// Part of multiply for one chunk of columns: `rows` rows of w, which are `apart` from each other, and `group` of x. Of
// the latter, `tokens` are kept, and the last of those stands in for the rest. The types and numbers, but for `tokens`,
// are known when it is compiled, so that all sums are registers; gcc sees them in parameters, not in a Tensor. So are the
// tokens, and of the rows one: as AVX2 has it, 4 x 3 sums, 3 tokens and a row, which may have to be converted, are 16.
INLINE void tile(float *out, size_t stride, Tensor w, Dtype w_type, size_t rows, size_t apart, Tensor x, Dtype x_type,
                 size_t group, size_t tokens, bool add, Fetch *fetch) {
    const bool pairs = w_type == BF16 && x_type == BF16;
    const size_t step = pairs ? 2 * W : W, chains = pairs ? PAIR_CHAINS : CHAINS;
    const size_t n = group == 1 ? chains : 1; // chains at a time
    vec sums[GROUP][TILE_ROWS], chain[GROUP][TILE_ROWS][CHAINS];
    for (size_t first = 0; first < chains; first += n) {
        for (size_t t = 0; t < group; t++)
            for (size_t r = 0; r < rows; r++)
                for (size_t j = 0; j < n; j++)
                    chain[t][r][j] = fill(0);
        for (size_t i = first * step; i < x.cols; i += chains * step)
            for (size_t j = 0; j < n && i + j * step < x.cols; j++) {
                vec token[GROUP];
                for (size_t t = 0; t < group; t++)
                    token[t] =
                        in_register(load(x.data, x_type, pairs, smaller(t, tokens - 1) * x.stride + i + j * step));
                for (size_t l = 0; fetch && l < fetch->lines && fetch->next < fetch->end; l++, fetch->next += 64)
                    __builtin_prefetch(fetch->next, 0, 2); // 2: not into the innermost cache, which is full
                for (size_t r = 0; r < rows; r++) {
                    size_t at = r * apart * w.stride + i + j * step;
                    if (group == 1 && (W < 16 || !pairs)) // else the processor looks far enough ahead
                        __builtin_prefetch((const char *)address(w.data, w_type, at) + AHEAD, 0, NEARNESS);
                    vec row = load(w.data, w_type, pairs, at);
                    for (size_t t = 0; t < group; t++)
                        chain[t][r][j] = accumulate(row, token[t], chain[t][r][j], pairs);
                }
            }
        for (size_t t = 0; t < group; t++)
            for (size_t r = 0; r < rows; r++)
                for (size_t j = 0; j < n; j++)
                    sums[t][r] = first + j == 0 ? chain[t][r][0] : (vec)(sums[t][r] + chain[t][r][j]);
    }
    for (size_t t = 0; t < tokens; t++)
        if (rows == TILE_ROWS) {
            put4(out + t * stride, sums[t][0], sums[t][1], sums[t][2], sums[t][3], add);
        } else {
            float sum[TILE_ROWS];
            put4(sum, sums[t][0], rows > 1 ? sums[t][1] : fill(0), fill(0), fill(0), false);
            for (size_t r = 0; r < rows; r++)
                out[t * stride + r * apart] = (add ? out[t * stride + r * apart] : 0) + sum[r];
        }
}

// Part of multiply for whole tiles and vectors, so that each weight loaded is used several times. The tokens' part of one
// chunk and TILE_TOKENS stays in the innermost cache while the rows of w pass. Meanwhile, the rows that follow in memory
// are fetched, which are likely to be multiplied next: for many tokens, some lines of the cache before each tile; for up to
// some_tokens, where memory is the limit, with each vector of a tile: to ask for all at once was slower by a quarter.
INLINE void multiply_tiles(float *out, size_t stride, Tensor w, Dtype w_type, Tensor x, Dtype x_type, bool add,
                           bool many) {
    const size_t step = w_type == BF16 && x_type == BF16 ? 2 * W : W, chunk = CHUNK_BYTES / size_of(x_type);
    size_t lines = TILE_ROWS * w.stride * size_of(w_type) / 64; // of the cache, in a tile's rows
    size_t tiles = (x.rows + TILE_TOKENS - 1) / TILE_TOKENS * ((x.cols + chunk - 1) / chunk), n; // of those rows
    size_t steps = (x.rows + GROUP - 1) / GROUP * (x.cols / step);
    Fetch fetch = {address(w.data, w_type, w.rows * w.stride), address(w.data, w_type, 2 * w.rows * w.stride),
                   many ? lines / tiles + 1 : (lines + steps - 1) / steps};
    for (size_t c = 0; c < x.cols; c += n) {
        n = smaller(chunk, x.cols - c);
        for (size_t first = 0; first < x.rows; first += TILE_TOKENS)
            for (size_t r = 0; r < w.rows; r += TILE_ROWS) {
                size_t end = smaller(first + TILE_TOKENS, x.rows), tokens;
                for (size_t i = 0; many && i < fetch.lines; i++, fetch.next += 64)
                    __builtin_prefetch(fetch.next, 0, 2);
                for (size_t t = first; t < end; t += tokens) {
                    tokens = smaller(GROUP, end - t);
                    tile(out + t * stride + r, stride, part(w, r, TILE_ROWS, c, n), w_type, TILE_ROWS, 1,
                         part(x, t, tokens, c, n), x_type, GROUP, tokens, add || c, many ? NULL : &fetch);
                }
            }
    }
}

INLINE void multiply_typed(float *out, size_t stride, Tensor w, Dtype w_type, Tensor x, Dtype x_type, bool add) {
    w.dtype = w_type;
    x.dtype = x_type;
    size_t step = w_type == BF16 && x_type == BF16 ? 2 * W : W, cols = x.cols / step * step;
    size_t chunk = CHUNK_BYTES / size_of(x_type), n;
    size_t whole = x.rows > 1 && cols ? w.rows / TILE_ROWS * TILE_ROWS : 0;
    Tensor rows = part(w, 0, whole, 0, cols), tokens = part(x, 0, x.rows, 0, cols);
    if (whole && x.rows > some_tokens())
        multiply_tiles(out, stride, rows, w_type, tokens, x_type, add, true);
    else if (whole)
        multiply_tiles(out, stride, rows, w_type, tokens, x_type, add, false);
    // One token, or what is left of the rows: two rows at a time, the one from the first half and the other from the
    // second. Memory delivers more to two runs far apart than to one run, and less to two neighbours.
    size_t half = (w.rows - whole) / 2;
    for (size_t t = 0; t < x.rows; t++)
        for (size_t i = 0; i < w.rows - whole - half; i++) {
            size_t r = whole + (i < half ? i : 2 * half);
            for (size_t c = 0; c < cols; c += n) {
                n = smaller(chunk, cols - c);
                Tensor row = part(w, r, 1, c, n), token = part(x, t, 1, c, n);
                if (i < half)
                    tile(out + t * stride + r, stride, row, w_type, 2, half, token, x_type, 1, 1, add || c, NULL);
                else
                    tile(out + t * stride + r, stride, row, w_type, 1, 1, token, x_type, 1, 1, add || c, NULL);
            }
        }
    // the last columns, which are less than a vector
    for (size_t t = 0; t < x.rows && cols < x.cols; t++)
        for (size_t r = 0; r < w.rows; r++)
            out[t * stride + r] = (add || cols ? out[t * stride + r] : 0) +
                                  dot_ref(address(w.data, w_type, r * w.stride + cols), w_type,
                                          address(x.data, x_type, t * x.stride + cols), x_type, x.cols - cols);
}

static void multiply(float *out, size_t stride, Tensor w, Tensor x, bool add) {
    if (x.dtype == BF16)
        multiply_typed(out, stride, w, BF16, x, BF16, add);
    else if (w.dtype == F32)
        multiply_typed(out, stride, w, F32, x, F32, add);
    else if (w.dtype == BF16)
        multiply_typed(out, stride, w, BF16, x, F32, add);
    else
        multiply_typed(out, stride, w, F16, x, F32, add);
}

// weigh for `columns` vectors of columns from column `first` on; the numbers of both are known when it is compiled
INLINE void weigh_fixed(float *y, size_t y_stride, const float *a, size_t a_stride, size_t queries, const uint16_t *x,
                        bool pairs, size_t m, size_t n, size_t first, size_t columns) {
    const size_t P = pairs ? 2 : 1;
    vec sums[QUERY_TILE][COLUMNS];
    for (size_t q = 0; q < queries; q++)
        for (size_t c = 0; c < columns; c++)
            sums[q][c] = load_f32(y + q * y_stride + first + c * W);
    for (size_t j = 0; j < m; j++) {
        vec row[COLUMNS];
        for (size_t c = 0; c < columns; c++) {
            const uint16_t *at = x + (j * n + first + c * W) * P;
            row[c] = pairs ? load_f32(at) : load_f16(at);
            if (c * W * P % 32 == 0) // a line of the block of keys or values that follows
                __builtin_prefetch(at + m * n * P, 0, 2);
        }
        for (size_t q = 0; q < queries; q++) {
            uint32_t bits;
            memcpy(&bits, a + q * a_stride + j, sizeof bits);
            vec weight = fill(bits);
            for (size_t c = 0; c < columns; c++)
                sums[q][c] = accumulate(weight, row[c], sums[q][c], pairs);
        }
    }
    for (size_t q = 0; q < queries; q++)
        for (size_t c = 0; c < columns; c++)
            store(y + q * y_stride + first + c * W, sums[q][c]);
}

INLINE void weigh_typed(float *y, size_t y_stride, const float *a, size_t a_stride, size_t queries, const uint16_t *x,
                        bool pairs, size_t m, size_t n) {
    size_t c = 0;
    for (; c + COLUMNS * W <= n; c += COLUMNS * W)
        if (queries == QUERY_TILE)
            weigh_fixed(y, y_stride, a, a_stride, QUERY_TILE, x, pairs, m, n, c, COLUMNS);
        else
            weigh_fixed(y, y_stride, a, a_stride, 1, x, pairs, m, n, c, COLUMNS);
    for (; c < n; c += W) // what is left, a vector at a time, of which the last one may be used in part only
        for (size_t q = 0; q < queries; q++) {
            size_t size = smaller(W, n - c) * sizeof(float);
            float part[W] = {0};
            memcpy(part, y + q * y_stride + c, size);
            weigh_fixed(part, W, a + q * a_stride, a_stride, 1, x + c * (pairs ? 2 : 1), pairs, m, n, 0, 1);
            memcpy(y + q * y_stride + c, part, size);
        }
}

static void weigh(float *y, size_t y_stride, const float *a, size_t a_stride, size_t queries, const uint16_t *x,
                  bool pairs, size_t m, size_t n) {
    if (pairs)
        weigh_typed(y, y_stride, a, a_stride, queries, x, true, m, n);
    else
        weigh_typed(y, y_stride, a, a_stride, queries, x, false, m, n);
}

INLINE double multiply_only_typed(bool pairs, size_t rounds) {
    vec sums[GROUP][TILE_ROWS], factor = in_register(fill(0)); // as many sums as tile has
    for (size_t t = 0; t < GROUP; t++)
        for (size_t r = 0; r < TILE_ROWS; r++)
            sums[t][r] = in_register(fill(0));
    for (size_t i = 0; i < rounds; i++)
        for (size_t t = 0; t < GROUP; t++)
            for (size_t r = 0; r < TILE_ROWS; r++)
                sums[t][r] = accumulate(factor, factor, sums[t][r], pairs);
    volatile vec used; // or the compiler would leave out the loop
    for (size_t t = 0; t < GROUP; t++)
        for (size_t r = 0; r < TILE_ROWS; r++)
            used = sums[t][r];
    (void)used;
    return (double)rounds * GROUP * TILE_ROWS * W * (pairs ? 4 : 2);
}

#ifdef TILES

#include <sys/syscall.h>

// AMX has registers for tiles of 16 rows of 64 bytes. One instruction takes 16 pairs of columns, of 16 tokens and of 16
// rows of weights, and adds to 16 x 16 sums: it adds up the products of the pairs' first elements, one after the other,
// those of the second elements apart from them, and both to the sum. Vectors can do just that for one token, a PANEL of 16
// vectors of 16 pairs at a time, if the tiles share the panel as the lanes do: tile i takes the pairs that are number i of
// their vectors. So prompts go by tiles, single tokens by vectors, which read memory faster, and the bits are the same.

// Linux gives the registers for tiles only to programs that ask for them.
static bool ask_for_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
    expect(
        syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0,
        "the system does not let this program use AMX: %s; make ARCH='-march=native -mno-amx-bf16' builds one without",
        strerror(errno));
    return true;
}

// All eight tiles of this thread are 16 rows of 64 bytes, and 0.
static void shape_tiles(void) {
    static const struct {
        uint8_t palette, reserved[15];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shapes = {1, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {W, W, W, W, W, W, W, W}};
    _tile_loadconfig(&shapes);
}

// Rows of 16 floats, or pairs, become columns: in four steps, each of which swaps blocks of `size` x `size`.
INLINE void transpose(vec rows[W]) {
#pragma GCC unroll 4
    for (uint32_t size = 1; size < W; size *= 2) {
        vec_u32 low, high;
        for (uint32_t i = 0; i < W; i++) {
            low[i] = i & size ? W + i - size : i;
            high[i] = i & size ? W + i : i + size;
        }
#pragma GCC unroll 16
        for (uint32_t i = 0; i < W; i++)
            if (!(i & size)) {
                vec a = rows[i], b = rows[i + size];
                rows[i] = _mm512_permutex2var_ps(a, (__m512i)low, b);
                rows[i + size] = _mm512_permutex2var_ps(a, (__m512i)high, b);
            }
    }
}

// 16 pairs of bf16, of which `left` elements, or all, are there; the others are 0.
INLINE vec load_pairs(const uint16_t *p, size_t left) {
    return left >= 2 * W ? load_f32(p) : (vec)_mm512_maskz_loadu_epi16((1u << left) - 1, p);
}

// x (cols), then 0 up to a whole panel: within each, the 16 pairs that go into one tile come to stand together.
static void deal_out(uint16_t *x, size_t cols) {
    for (size_t c = 0; c < cols; c += PANEL) {
        vec pairs[W];
        for (size_t j = 0; j < W; j++) {
            size_t at = smaller(c + j * 2 * W, cols);
            pairs[j] = load_pairs(x + at, cols - at);
        }
        transpose(pairs);
        memcpy(x + c, pairs, sizeof pairs);
    }
}

// out: for each 16 rows of w, for each 16 pairs of their columns, a tile (pairs, rows). To whole panels, and SQUARE rows:
// columns that are missing are 0, and the last row stands in for others.
static void pack(uint16_t *out, Tensor w) {
    const uint16_t *weights = w.data;
    for (size_t r = 0; r < multiple_of(SQUARE, w.rows); r += W)
        for (size_t c = 0; c < w.cols; c += PANEL, out += W * PANEL)
            for (size_t j = 0; j < W; j++) {
                vec pairs[W];
                size_t at = smaller(c + j * 2 * W, w.cols);
                for (size_t i = 0; i < W; i++)
                    pairs[i] = load_pairs(weights + smaller(r + i, w.rows - 1) * w.stride + at, w.cols - at);
                transpose(pairs);
                for (size_t i = 0; i < W; i++) // row j of tile i
                    memcpy(out + (i * W + j) * 2 * W, &pairs[i], sizeof pairs[i]);
            }
}

// out[t][r] = sum_c w[r][c] x[t][c], or += it, for w (rows, cols) from `pack` and x (T, cols) from `deal_out`
static void multiply_packed(float *out, size_t stride, const uint16_t *w, size_t rows, Tensor x, bool add) {
    const long x_stride = (long)(x.stride * sizeof(uint16_t)), row = SQUARE * sizeof(float);
    // gcc does not know that tiles are loaded from memory: what is to be loaded has to be written before this.
    __asm__ volatile("" : : : "memory");
    for (size_t t = 0; t < x.rows; t += SQUARE)
        for (size_t r = 0; r < rows; r += SQUARE) {
            const uint16_t *upper = address(x.data, BF16, t * x.stride), *lower = upper + W * x.stride;
            const uint16_t *left = w + r * x.cols, *right = left + W * x.cols;
            float sums[SQUARE][SQUARE];
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (size_t c = 0; c < x.cols; c += 2 * W) {
                _tile_loadd(4, upper + c, x_stride);
                _tile_loadd(6, left + c * W, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, right + c * W, 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, lower + c, x_stride);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, sums[0], row);
            _tile_stored(1, sums[0] + W, row);
            _tile_stored(2, sums[W], row);
            _tile_stored(3, sums[W] + W, row);
            for (size_t i = 0; i < smaller(SQUARE, x.rows - t); i++)
                for (size_t j = 0; j < smaller(SQUARE, rows - r); j++)
                    out[(t + i) * stride + r + j] = (add ? out[(t + i) * stride + r + j] : 0) + sums[i][j];
        }
}

// The first, or the second, of each pair of bf16, as f32.
INLINE vec first_of(vec pairs) { return (vec)((vec_u32)pairs << 16); }
INLINE vec second_of(vec pairs) { return (vec)((vec_u32)pairs & 0xffff0000); }

// y + sum_c w[c] x[c] for one row of weights and one token, as they are: the same additions
static float multiply_row(float y, const uint16_t *w, const uint16_t *x, size_t cols) {
    float sum = 0, lanes[W];
    for (size_t c = 0; c < cols; c += PANEL) {
        vec first = fill(0), second = fill(0);
        for (size_t i = c; i < smaller(c + PANEL, cols); i += 2 * W) {
            vec weights = load_pairs(w + i, cols - i), token = load_pairs(x + i, cols - i);
            __builtin_prefetch((const char *)(w + i) + 4096, 0, 2);
            first = multiply_add(first_of(weights), first_of(token), first);
            second = multiply_add(second_of(weights), second_of(token), second);
        }
        store(lanes, first + second); // what 16 tiles add
        for (size_t i = 0; i < W; i++)
            sum += lanes[i];
        if ((c + PANEL) % TILE_COLUMNS == 0 || c + PANEL >= cols) { // where a product by tiles ends, too
            y += sum;
            sum = 0;
        }
    }
    return y;
}

static bool matmul_by_tiles(float *out, Tensor w, size_t T, bool add, State *s) {
    if (w.dtype != BF16 || w.cols < PANEL / 2) // narrower panels would be mostly padding
        return false;
    uint16_t *input = s->input, *packed = (uint16_t *)scratch_of(s);
    size_t stride = input_stride(w.cols), n;
    unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040); // what is below 2^-126 counts as 0, read (0x40) or made (0x8000), as with tiles
    if (T > 1) {               // one token goes by vectors, which take it as it is
#pragma omp for
        for (size_t t = 0; t < T; t++)
            deal_out(input + t * stride, w.cols);
    }
    shape_tiles();
    // As many blocks for each thread, of rows that stay in the second-level cache, packed, while all tokens pass.
    size_t share = (w.rows + s->threads - 1) / s->threads, blocks = (share + TILE_BLOCK - 1) / TILE_BLOCK;
    size_t block = multiple_of(SQUARE, (share + blocks - 1) / blocks);
#pragma omp for schedule(static)
    for (size_t r = 0; r < w.rows; r += block) {
        size_t rows = smaller(block, w.rows - r);
        if (T == 1)
            for (size_t i = r; i < r + rows; i++)
                out[i] = multiply_row(add ? out[i] : 0, address(w.data, BF16, i * w.stride), input, w.cols);
        else
            for (size_t c = 0; c < w.cols; c += n) {
                n = smaller(TILE_COLUMNS, w.cols - c);
                pack(packed, part(w, r, rows, c, n));
                Tensor in = {input + c, BF16, T, multiple_of(PANEL, n), stride};
                multiply_packed(out + r, w.rows, packed, rows, in, add || c);
            }
    }
    _tile_release();
    _mm_setcsr(mode);
    return true;
}

static double multiply_only(bool pairs, size_t rounds) {
    if (!pairs)
        return multiply_only_typed(false, rounds);
    shape_tiles();
    for (size_t i = 0; i < rounds; i++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return (double)rounds * 4 * W * W * 4 * W; // four tiles of 16 x 16 sums, each of 16 pairs of products
}

#else
static bool ask_for_tiles(void) { return false; }

static bool matmul_by_tiles(float *out, Tensor w, size_t T, bool add, State *s) {
    (void)out, (void)w, (void)T, (void)add, (void)s;
    return false;
}

static double multiply_only(bool pairs, size_t rounds) {
    return pairs ? multiply_only_typed(true, rounds) : multiply_only_typed(false, rounds);
}
#endif

// ------------------------------------------------------------------------------------------------
// 9 Appendix: paging
//
// A model larger than memory. Each pass reads the file in its order, and a system that makes room by letting go what was not
// used for longest always lets go what is needed next. So a piece of the file that has to be read again, pass after pass, is
// let go as soon as the product with it is done, and what else is in memory stays there.

enum { PIECE_BYTES = 16 << 20, PIECES_AHEAD = 2, MIN_PAGE = 4096 };

struct Paging {
    const Model *m;
    size_t at;        // where in the file this pass is
    long waits;       // the process's page faults, those that had to read, when it began; before the first LONG_MAX
    bool active;      // there were some in the pass before
    size_t looked_at; // the pieces before this one have been looked for in memory in this pass,
    size_t used;      // and those before this one have been used
    uint8_t *missing; // (pieces) in how many passes in a row it was not there, 2 at most
    size_t spared;    // the first one missing in this pass, which stays after use: there may be room for it by now
};

#ifdef __linux__
// Finds out if a piece is in memory, half of its pages at least.
static void look_at(Paging *p, size_t piece) {
    unsigned char pages[PIECE_BYTES / MIN_PAGE];
    size_t start = piece * PIECE_BYTES, size = smaller(PIECE_BYTES, p->m->file.n - start);
    size_t n = size / (size_t)sysconf(_SC_PAGESIZE), found = 0;
    bool known = !mincore((unsigned char *)p->m->file.bytes + start, size, pages);
    for (size_t i = 0; i < n && known; i++)
        found += pages[i] & 1;
    bool gone = known && found < n / 2;
    p->missing[piece] = gone ? p->missing[piece] ? 2 : 1 : 0;
    if (gone && p->spared == SIZE_MAX)
        p->spared = piece;
}

static void let_go(const Paging *p, size_t piece) {
    size_t start = piece * PIECE_BYTES, size = smaller(PIECE_BYTES, p->m->file.n - start);
    if (p->missing[piece] == 2 && piece != p->spared) {
        madvise((unsigned char *)p->m->file.bytes + start, size, MADV_DONTNEED);      // this process needs it no more,
        posix_fadvise(p->m->file.fd, (off_t)start, (off_t)size, POSIX_FADV_DONTNEED); // nor does the system
    }
}

static void turn_pages(Paging *p, Tensor w) {
    if (!p)
        return;
    const unsigned char *data = w.data;
    size_t start = (size_t)(data - p->m->file.bytes), size = w.rows * w.cols * sizeof(uint16_t);
    if (start < p->at) { // another pass begins
        while (p->used < p->looked_at)
            let_go(p, p->used++);
        struct rusage usage;
        getrusage(RUSAGE_SELF, &usage);
        p->active = usage.ru_majflt > p->waits;
        p->waits = usage.ru_majflt;
        p->used = p->looked_at = start / PIECE_BYTES;
        p->spared = SIZE_MAX;
    }
    p->at = start;
    // Looks at pieces before the system does, which reads ahead, too.
    size_t end = smaller(start + size + PIECES_AHEAD * PIECE_BYTES, p->m->file.n);
    while (p->active && p->looked_at * PIECE_BYTES < end)
        look_at(p, p->looked_at++);
    while (p->active && (p->used + 1) * PIECE_BYTES <= start)
        let_go(p, p->used++);
}

static Paging *open_paging(const Model *m) {
    if (m->file.n <= PIECE_BYTES)
        return NULL;
    size_t pieces = m->file.n / PIECE_BYTES + 1;
    Paging *p = allocate(1, sizeof *p, "paging");
    *p = (Paging){.m = m, .at = m->file.n, .waits = LONG_MAX, .missing = allocate(pieces, 1, "paging")};
    memset(p->missing, 0, pieces);
    return p;
}
#else
static void turn_pages(Paging *p, Tensor w) { (void)p, (void)w; }
static Paging *open_paging(const Model *m) { return (void)m, NULL; }
#endif
