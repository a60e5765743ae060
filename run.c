/* run.c: a large language model is two files, the weights and this program that runs them.
 *
 * It maps a weights file of 2 bytes a parameter, feeds tokens through the Transformer with the loops
 * below, and samples the next token, again and again. It runs any model of the Llama family that
 * export.py has converted. It does not train, does not quantise, and does not know any model by name.
 * It needs libc and libm; with OpenMP it uses all cores.
 *
 *   1 The model file      what is in it, and how it is mapped and checked
 *   2 Kernels             matmul, rmsnorm, rope, attention, swiglu, each once, in plain C
 *   3 The forward pass    the whole Transformer
 *   4 Sampling            from logits to the next token
 *   5 The tokenizer       from text to tokens and back
 *   6 Modes               generate, tokenize
 *   7 The command line
 *   8 Appendix: SIMD      the two inner loops again, for AVX-512, AVX2, NEON
 *
 * Shapes are written (rows, columns), the last one contiguous, with these letters:
 *
 *   T tokens of this batch    D dim            H n_heads       d head_dim    Q = H*d
 *   C positions of context    F hidden_dim     G n_kv_heads    V vocab_size  K = G*d
 *
 * Two promises shape the code. The bits of a token's logits depend on the tokens before it alone, never
 * on the number of threads or on how a prompt was cut into batches: every sum has one fixed order.
 * And a bad file or flag is one clear line on standard error, never a crash.
 */
#define _GNU_SOURCE // sched_getaffinity, madvise
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <math.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define VERSION "0.1.0"
#define DEFAULT_MODEL "models/stories.bin"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the files are little-endian and are mapped as they are");

enum { CANNOT = 1, USAGE = 2 }; // exit status: a bad file or no memory; wrong usage

__attribute__((format(printf, 2, 3))) static _Noreturn void die(int status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fputs("run: ", stderr);
    vfprintf(stderr, format, args);
    fputs(status == USAGE ? " (run --help shows the usage)\n" : "\n", stderr);
    va_end(args);
    exit(status);
}

// `count` zeroed elements, or the end of the program.
static void *allocate(size_t count, size_t size, const char *what)
{
    void *memory = calloc(count ? count : 1, size);
    if (!memory) {
        die(CANNOT, "no memory for %s: %.1f MB needed", what, (double)count * (double)size / 1e6);
    }
    return memory;
}

static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

static size_t larger(size_t a, size_t b)
{
    return a > b ? a : b;
}

// ------------------------------------------------------------------------------------------------
// 1 The model file

// How numbers are stored. In files only the 16-bit types occur.
typedef enum { F32, BF16, F16 } Dtype;

enum { TIED = 1, QKV_BIAS = 2, QK_NORM = 4, ALL_FLAGS = 7 }; // Header.flags
enum { ROPE_PLAIN, ROPE_LINEAR, ROPE_LLAMA3 };               // Header.rope_scaling
enum { HEADER_SPACE = 4096, ALIGNMENT = 64 };

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
    const void *data; // (rows, cols), inside the mapped file
    Dtype dtype;
    size_t rows, cols;
} Tensor;

typedef struct {
    Tensor attn_norm; // (D)
    Tensor wqkv;      // (Q + 2K, D)   wq, wk and wv, one below the other
    Tensor bqkv;      // (Q + 2K)      only with QKV_BIAS
    Tensor q_norm;    // (d)           only with QK_NORM
    Tensor k_norm;    // (d)           only with QK_NORM
    Tensor wo;        // (D, Q)
    Tensor ffn_norm;  // (D)
    Tensor w_gate_up; // (2F, D)       w_gate and w_up, one below the other
    Tensor w_down;    // (D, F)
} Layer;

typedef struct {
    const char *path;
    const unsigned char *map; // the whole file
    size_t size;
    Header h;
    size_t q_dim, kv_dim; // Q and K
    Tensor embedding;     // (V, D)
    Layer *layers;
    Tensor final_norm; // (D)
    Tensor classifier; // (V, D)        the embedding itself if TIED
} Model;

// Maps a file, read-only. Nothing is read yet: the kernel brings in a page when it is first touched.
static const void *map_file(const char *path, size_t min_size, const char *what, size_t *size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st)) {
        die(CANNOT, "%s: expected %s: %s", path, what, strerror(errno));
    }
    if (!S_ISREG(st.st_mode)) {
        die(CANNOT, "%s: expected %s, found %s", path, what, S_ISDIR(st.st_mode) ? "a directory" : "no regular file");
    }
    if (st.st_size < (off_t)min_size) {
        die(CANNOT, "%s: expected %s of at least %zu bytes, found %lld bytes", path, what, min_size,
            (long long)st.st_size);
    }
    *size = (size_t)st.st_size;
    const void *map = mmap(NULL, *size, PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) {
        die(CANNOT, "%s: cannot map %zu bytes: %s", path, *size, strerror(errno));
    }
    close(fd);
    return map;
}

// Another program's file is the likeliest mistake, so show what stands where the magic should.
static void check_magic(const char *path, const char *magic, const char *found, const char *what)
{
    if (memcmp(found, magic, 8)) {
        char shown[9] = {0};
        for (int i = 0; i < 8; i++) {
            shown[i] = found[i] >= ' ' && found[i] <= '~' ? found[i] : '.';
        }
        die(CANNOT, "%s: not %s: expected the first 8 bytes \"%s\", found \"%s\" (export.py converts other formats)",
            path, what, magic, shown);
    }
}

// Bounds that keep every size computed from a header far below 2^63, and refuse nonsense early.
static void check_header(const Model *m)
{
    const Header *h = &m->h;
    const struct {
        const char *name;
        uint32_t value, min, max;
    } fields[] = {
        {"version", h->version, 1, 1},
        {"dtype", h->dtype, BF16, F16},
        {"flags", h->flags, 0, ALL_FLAGS},
        {"dim", h->dim, 1, 1 << 20},
        {"hidden_dim", h->hidden_dim, 1, 1 << 22},
        {"n_layers", h->n_layers, 1, 1 << 12},
        {"n_heads", h->n_heads, 1, 1 << 14},
        {"n_kv_heads", h->n_kv_heads, 1, h->n_heads},
        {"head_dim", h->head_dim, 2, 1 << 10},
        {"vocab_size", h->vocab_size, 1, 1 << 24},
        {"max_seq_len", h->max_seq_len, 1, 1 << 28},
        {"rope_scaling", h->rope_scaling, ROPE_PLAIN, ROPE_LLAMA3},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        if (fields[i].value < fields[i].min || fields[i].value > fields[i].max) {
            die(CANNOT, "%s: %s: expected %u to %u, found %u", m->path, fields[i].name, fields[i].min, fields[i].max,
                fields[i].value);
        }
    }
    if (h->n_heads % h->n_kv_heads) {
        die(CANNOT, "%s: n_kv_heads: expected a divisor of n_heads %u, found %u", m->path, h->n_heads, h->n_kv_heads);
    }
    if (h->head_dim % 2) {
        die(CANNOT, "%s: head_dim: expected an even number, found %u", m->path, h->head_dim);
    }
    if (!(h->norm_eps >= 0 && h->norm_eps < 1)) {
        die(CANNOT, "%s: norm_eps: expected 0 to 1, found %g", m->path, (double)h->norm_eps);
    }
    if (!(h->rope_theta >= 1 && h->rope_theta <= FLT_MAX)) {
        die(CANNOT, "%s: rope_theta: expected 1 or more, found %g", m->path, (double)h->rope_theta);
    }
    bool llama3 = h->rope_scaling == ROPE_LLAMA3;
    if (h->rope_scaling != ROPE_PLAIN && !(h->rope_factor >= 1 && h->rope_factor <= FLT_MAX)) {
        die(CANNOT, "%s: rope_factor: expected 1 or more, found %g", m->path, (double)h->rope_factor);
    }
    if (llama3 && !(h->rope_low_freq_factor > 0 && h->rope_high_freq_factor > h->rope_low_freq_factor &&
                    h->rope_high_freq_factor <= FLT_MAX && h->rope_original_max_seq_len > 0)) {
        die(CANNOT, "%s: rope scaling: expected 0 < low < high frequency factor, found %g and %g, for %u positions",
            m->path, (double)h->rope_low_freq_factor, (double)h->rope_high_freq_factor, h->rope_original_max_seq_len);
    }
    if (h->file_size != m->size) {
        die(CANNOT, "%s: file size: expected %llu bytes by its header, found %zu: incomplete or damaged", m->path,
            (unsigned long long)h->file_size, m->size);
    }
    for (size_t i = sizeof *h; i < HEADER_SPACE; i++) {
        if (m->map[i]) {
            die(CANNOT, "%s: byte %zu of the header: expected 0, found %u", m->path, i, m->map[i]);
        }
    }
}

// The next tensor of the file. `at` is where the one before it ended.
static Tensor take(const Model *m, size_t *at, const char *name, size_t rows, size_t cols)
{
    size_t start = (*at + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    size_t bytes = rows * cols * sizeof(uint16_t);
    if (start > m->size || bytes > m->size - start) {
        die(CANNOT, "%s: %s: expected bytes %zu to %zu, found only %zu bytes", m->path, name, start, start + bytes,
            m->size);
    }
    *at = start + bytes;
    return (Tensor){m->map + start, (Dtype)m->h.dtype, rows, cols};
}

static Model open_model(const char *path)
{
    Model m = {.path = path};
    m.map = map_file(path, HEADER_SPACE, "a weights file made by export.py", &m.size);
    memcpy(&m.h, m.map, sizeof m.h);
    check_magic(path, "twofiles", m.h.magic, "a weights file");
    check_header(&m);
    size_t D = m.h.dim, F = m.h.hidden_dim, V = m.h.vocab_size, d = m.h.head_dim;
    size_t Q = m.q_dim = m.h.n_heads * d;
    size_t K = m.kv_dim = m.h.n_kv_heads * d;

    // The order of the file is the order of use.
    size_t at = HEADER_SPACE;
    m.embedding = take(&m, &at, "embedding", V, D);
    m.layers = allocate(m.h.n_layers, sizeof *m.layers, "the table of layers");
    for (size_t i = 0; i < m.h.n_layers; i++) {
        Layer *l = &m.layers[i];
        l->attn_norm = take(&m, &at, "attn_norm", 1, D);
        l->wqkv = take(&m, &at, "wqkv", Q + 2 * K, D);
        if (m.h.flags & QKV_BIAS) {
            l->bqkv = take(&m, &at, "bqkv", 1, Q + 2 * K);
        }
        if (m.h.flags & QK_NORM) {
            l->q_norm = take(&m, &at, "q_norm", 1, d);
            l->k_norm = take(&m, &at, "k_norm", 1, d);
        }
        l->wo = take(&m, &at, "wo", D, Q);
        l->ffn_norm = take(&m, &at, "ffn_norm", 1, D);
        l->w_gate_up = take(&m, &at, "w_gate_up", 2 * F, D);
        l->w_down = take(&m, &at, "w_down", D, F);
    }
    m.final_norm = take(&m, &at, "final_norm", 1, D);
    m.classifier = m.h.flags & TIED ? m.embedding : take(&m, &at, "classifier", V, D);
    if (at != m.size) {
        die(CANNOT, "%s: file size: expected %zu bytes by its dimensions, found %zu", path, at, m.size);
    }
    return m;
}

// ------------------------------------------------------------------------------------------------
// 2 Kernels
//
// Each is called by all threads at once. "omp for" gives every thread its share of the loop and lets
// none go on before all are done; without OpenMP, or outside a parallel region, it is a plain loop.

enum {
    TILE_ROWS = 4,   // rows of weights that are multiplied at a time
    BLOCK_ROWS = 64, // rows that stay in the cache while all tokens of a batch pass by
    FEW_TOKENS = 6,  // a batch of fewer takes no blocks
    KEYS = 64,       // keys and values that attention handles at a time
    QUERIES = 64,    // queries that pass by one block of keys
    QUERY_TILE = 4,  // queries that share each key and value loaded
    MAX_BATCH = 512, // tokens in one pass, and fewer where their activations would take more than
    BATCH_BYTES = 32 << 20,
};

static inline float float_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float bf16_to_f32(uint16_t h)
{
    return float_from_bits((uint32_t)h << 16);
}

// Round to nearest, ties to even; NaN stays NaN.
static inline uint16_t f32_to_bf16(float value)
{
    uint32_t bits = bits_of_float(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

// The exponent of an f16 is biased by 15, that of an f32 by 127: the product with 2^112 corrects it, and
// turns f16's subnormal numbers into normal ones at the same time.
static inline float f16_to_f32(uint16_t h)
{
    float magnitude = float_from_bits((uint32_t)(h & 0x7fff) << 13) * 0x1p112f;
    uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000 : 0; // infinity or NaN
    return float_from_bits(bits_of_float(magnitude) | special | (uint32_t)(h & 0x8000) << 16);
}

// Round to nearest, ties to even; too large becomes infinity.
static inline uint16_t f32_to_f16(float value)
{
    uint32_t sign = bits_of_float(value) >> 16 & 0x8000;
    uint32_t bits = bits_of_float(value) & 0x7fffffff;
    uint32_t half;
    if (bits > 0x7f800000) {
        half = 0x7e00; // NaN
    } else if (bits >= 0x477ff000) {
        half = 0x7c00; // rounds to 65,536 or more
    } else if (bits < 0x38800000) {
        // Below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the low end of the sum.
        half = bits_of_float(float_from_bits(bits) + 0.5f) - 0x3f000000;
    } else {
        half = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
    }
    return (uint16_t)(half | sign);
}

// Element i of an array of any type.
static inline float element(const void *array, Dtype dtype, size_t i)
{
    switch (dtype) {
    case BF16: return bf16_to_f32(((const uint16_t *)array)[i]);
    case F16: return f16_to_f32(((const uint16_t *)array)[i]);
    default: return ((const float *)array)[i];
    }
}

static inline const void *element_address(const void *array, Dtype dtype, size_t i)
{
    return (const char *)array + i * (dtype == F32 ? sizeof(float) : sizeof(uint16_t));
}

static void widen(float *out, const void *array, Dtype dtype, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        out[i] = element(array, dtype, i);
    }
}

// e^x for x <= 0 within 3 units in the last place, and 0 below -87. Not libm's, because compilers make vector
// code of this one: x = n ln 2 + r, e^r is a polynomial, and 2^n goes straight into the exponent's bits.
static inline float exp_negative(float x)
{
    const float round = 12582912.0f; // 1.5 * 2^23: what is added to it loses its fraction
    float shifted = x * 1.44269504f + round;
    float n = shifted - round;
    float r = x - n * 0.693145752f - n * 1.42860677e-6f; // ln 2 in two parts, so that n times the first is exact
    float p = 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return x < -87.0f ? 0.0f : p * float_from_bits((bits_of_float(shifted) + 127) << 23);
}

// The two inner loops of all that follows, as plain C. The SIMD forms in the appendix do the same sums in
// a vector's order; these say what is computed, finish what is left over, and are what the tests compare with.

// The dot product of which every matrix product is made: sum_i a[i] b[i].
static float dot_ref(const void *a, Dtype a_type, const void *b, Dtype b_type, size_t n)
{
    float sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += element(a, a_type, i) * element(b, b_type, i);
    }
    return sum;
}

// The weighted sum of rows of which attention is made: y[c] += sum_j a[j] x[j][c], for x (m, stride) f16.
static void weigh_ref(float *y, const float *a, const uint16_t *x, size_t m, size_t n, size_t stride)
{
    for (size_t j = 0; j < m; j++) {
        for (size_t c = 0; c < n; c++) {
            y[c] += a[j] * f16_to_f32(x[j * stride + c]);
        }
    }
}

// Their fast forms (appendix). `tile` is dot_ref for some rows of w (rows, n) by some tokens of x (tokens, n),
// `weigh` is weigh_ref for up to QUERY_TILE vectors at once; both take any number of rows, tokens, columns.
static void tile(float *out, size_t out_stride, bool add, const void *w, Dtype w_type, size_t rows, const void *x,
                 Dtype x_type, size_t tokens, size_t n);
static void weigh(float *const *y, const float *const *a, size_t queries, const uint16_t *x, size_t m, size_t n);
static bool has_bf16_dot(void); // does `tile` multiply bf16 by bf16 with an instruction made for it?
static const char *isa(void);   // the instruction set, for people

// The memory of one run: the KV cache and the activations of one batch.
typedef struct {
    int threads;
    size_t context;  // C, a multiple of KEYS
    size_t batch;    // the largest T
    uint16_t *k;     // (layers, G, C/KEYS, d, KEYS) f16   each block of KEYS keys is transposed
    uint16_t *v;     // (layers, G, C, d) f16
    float *x;        // (T, D)       the residual stream
    float *norm;     // (T, D)       x, normalised
    float *qkv;      // (T, Q + 2K)  queries, keys, values
    float *attended; // (T, Q)       what each head found
    float *gate_up;  // (T, 2F)
    float *hidden;   // (T, F)       silu(gate) * up
    float *logits;   // (V)
    float *cosine;   // (T, d/2)     RoPE's rotations at the positions of the batch
    float *sine;     // (T, d/2)
    uint16_t *narrow; // (T, max(D, Q, F)) bf16   a product's input, rounded
    float *wide;      // (threads, wide_size)     a block of weights as f32
    size_t wide_size;
} State;

static int thread_number(void)
{
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// out[t][r] = sum_c w[r][c] x[t][c]    x (T, cols), w (rows, cols), out (T, rows); or out += it, with `add`.
// The rows are dealt out among the threads. No sum is ever split, so its bits do not depend on the threads.
static void matmul(float *out, const float *x, Tensor w, size_t T, bool add, State *s)
{
    const void *input = x;
    Dtype input_type = F32;
    if (w.dtype == BF16 && has_bf16_dot()) { // the instruction takes both sides in bf16
#pragma omp for
        for (size_t t = 0; t < T; t++) {
            for (size_t c = 0; c < w.cols; c++) {
                s->narrow[t * w.cols + c] = f32_to_bf16(x[t * w.cols + c]);
            }
        }
        input = s->narrow;
        input_type = BF16;
    }
    bool widened = input_type == F32 && T >= FEW_TOKENS; // worth converting the weights once for all tokens
    size_t block = T < FEW_TOKENS ? TILE_ROWS : BLOCK_ROWS;
    if (widened) {
        block = smaller(block, s->wide_size / w.cols);
    }
#pragma omp for schedule(static)
    for (size_t r = 0; r < w.rows; r += block) {
        size_t rows = smaller(block, w.rows - r);
        const void *weights = element_address(w.data, w.dtype, r * w.cols);
        Dtype weights_type = w.dtype;
        if (widened) {
            float *wide = s->wide + (size_t)thread_number() * s->wide_size;
            widen(wide, weights, w.dtype, rows * w.cols);
            weights = wide;
            weights_type = F32;
        }
        tile(out + r, w.rows, add, weights, weights_type, rows, input, input_type, T, w.cols);
    }
}

// One vector: out = x / sqrt(mean(x^2) + eps) * weight       (Zhang and Sennrich 2019)
static void rmsnorm_one(float *out, const float *x, Tensor weight, float eps)
{
    size_t n = weight.cols;
    float sum = 0;
    tile(&sum, 1, false, x, F32, 1, x, F32, 1, n);
    float scale = 1.0f / sqrtf(sum / (float)n + eps);
    for (size_t i = 0; i < n; i++) {
        out[i] = x[i] * scale * element(weight.data, weight.dtype, i);
    }
}

// out, x (T, D)
static void rmsnorm(float *out, const float *x, Tensor weight, size_t T, float eps)
{
#pragma omp for
    for (size_t t = 0; t < T; t++) {
        rmsnorm_one(out + t * weight.cols, x + t * weight.cols, weight, eps);
    }
}

// x (T, D): the rows of the embedding that the tokens name
static void embed(float *x, Tensor embedding, const uint32_t *tokens, size_t T)
{
#pragma omp for
    for (size_t t = 0; t < T; t++) {
        const void *row = element_address(embedding.data, embedding.dtype, tokens[t] * embedding.cols);
        widen(x + t * embedding.cols, row, embedding.dtype, embedding.cols);
    }
}

// The angle, per position, by which pair i of a head is rotated: theta^(-2i/d), stretched for a longer context
// than a model was first trained for, either all alike ("linear") or as Llama 3.1 does: pairs that turn more than
// high_freq_factor times within the original context stay, those below low_freq_factor are slowed down by the
// factor, and those in between get a mixture.
static float rope_frequency(const Header *h, size_t i)
{
    float freq = 1.0f / powf(h->rope_theta, (float)(2 * i) / (float)h->head_dim);
    if (h->rope_scaling == ROPE_LINEAR) {
        return freq / h->rope_factor;
    }
    if (h->rope_scaling == ROPE_LLAMA3) {
        float turns = (float)h->rope_original_max_seq_len * freq / 6.28318531f;
        float keep = (turns - h->rope_low_freq_factor) / (h->rope_high_freq_factor - h->rope_low_freq_factor);
        keep = fminf(fmaxf(keep, 0.0f), 1.0f);
        return keep * freq + (1.0f - keep) * freq / h->rope_factor;
    }
    return freq;
}

// The rotations for positions pos to pos + T - 1, the same for every layer and head.
static void rope_table(const Header *h, State *s, size_t pos, size_t T)
{
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

// Rotates each pair (x[i], x[i + d/2]) of a head by its angle, in place     (Su et al. 2021)
static void rope(float *head, const float *cosine, const float *sine, size_t half)
{
    for (size_t i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = a * cosine[i] - b * sine[i];
        head[i + half] = b * cosine[i] + a * sine[i];
    }
}

// Where the cache holds the block of KEYS keys, or values, that starts at position `pos` (a multiple of KEYS).
static size_t cache_block(const Model *m, const State *s, size_t layer, size_t g, size_t pos)
{
    return ((layer * m->h.n_kv_heads + g) * s->context + pos) * m->h.head_dim;
}

// Makes queries, keys and values ready: bias and norm where the model has them, RoPE; keys and values into the cache.
static void prepare_qkv(const Model *m, State *s, size_t layer, size_t pos, size_t T)
{
    const Layer *l = &m->layers[layer];
    size_t d = m->h.head_dim, H = m->h.n_heads, G = m->h.n_kv_heads, width = m->q_dim + 2 * m->kv_dim;
#pragma omp for
    for (size_t t = 0; t < T; t++) {
        float *qkv = s->qkv + t * width;
        for (size_t i = 0; i < l->bqkv.cols; i++) {
            qkv[i] += element(l->bqkv.data, l->bqkv.dtype, i);
        }
        for (size_t head = 0; head < H + G; head++) { // the queries' heads, then the keys'
            if (m->h.flags & QK_NORM) {
                rmsnorm_one(qkv + head * d, qkv + head * d, head < H ? l->q_norm : l->k_norm, m->h.norm_eps);
            }
            rope(qkv + head * d, s->cosine + t * d / 2, s->sine + t * d / 2, d / 2);
        }
        size_t slot = (pos + t) % KEYS;
        for (size_t g = 0; g < G; g++) {
            size_t block = cache_block(m, s, layer, g, pos + t - slot);
            const float *key = qkv + m->q_dim + g * d;
            const float *value = key + m->kv_dim;
            for (size_t i = 0; i < d; i++) {
                s->k[block + i * KEYS + slot] = f32_to_f16(key[i]);
                s->v[block + slot * d + i] = f32_to_f16(value[i]);
            }
        }
    }
}

// The softmax of one block of scores when the blocks before it gave `max` and `sum`. Returns the factor for what
// was summed up with the old maximum.                         (online softmax, Milakov and Gimelshein 2018)
static float soften(float score[KEYS], size_t visible, float scale, float *max, float *sum)
{
    float fold[KEYS];
    for (size_t j = 0; j < KEYS; j++) {
        score[j] = j < visible ? score[j] * scale : -INFINITY;
        fold[j] = score[j];
    }
    for (size_t half = KEYS / 2; half; half /= 2) {
        for (size_t j = 0; j < half; j++) {
            fold[j] = fold[j] > fold[j + half] ? fold[j] : fold[j + half];
        }
    }
    float new_max = *max > fold[0] ? *max : fold[0];
    for (size_t j = 0; j < KEYS; j++) {
        score[j] = exp_negative(score[j] - new_max);
        fold[j] = score[j];
    }
    for (size_t half = KEYS / 2; half; half /= 2) {
        for (size_t j = 0; j < half; j++) {
            fold[j] += fold[j + half];
        }
    }
    float shrink = exp_negative(*max - new_max);
    *sum = *sum * shrink + fold[0];
    *max = new_max;
    return shrink;
}

// softmax(q . k / sqrt(d)) . v for `count` queries that share the keys of head g, one block of keys after the
// other. Query i belongs to token i / (H/G) of the batch and sees all positions up to its own.
static void attend(const Model *m, State *s, size_t layer, size_t g, size_t first, size_t count, size_t pos)
{
    size_t d = m->h.head_dim, group = m->h.n_heads / m->h.n_kv_heads, width = m->q_dim + 2 * m->kv_dim;
    float scale = 1.0f / sqrtf((float)d);
    const float *q[QUERIES]; // (d)
    float *out[QUERIES];     // (d)
    size_t seen[QUERIES];    // positions
    float max[QUERIES], sum[QUERIES];
    for (size_t i = 0; i < count; i++) {
        size_t t = (first + i) / group, head = g * group + (first + i) % group;
        q[i] = s->qkv + t * width + head * d;
        out[i] = s->attended + t * m->q_dim + head * d;
        memset(out[i], 0, d * sizeof(float));
        seen[i] = pos + t + 1;
        max[i] = -INFINITY;
        sum[i] = 0;
    }
    for (size_t start = 0; start < seen[count - 1]; start += KEYS) {
        size_t block = cache_block(m, s, layer, g, start);
        for (size_t i = 0; i < count; i += QUERY_TILE) {
            size_t queries = smaller(QUERY_TILE, count - i);
            float scores[QUERY_TILE][KEYS] = {0};
            float *const score[QUERY_TILE] = {scores[0], scores[1], scores[2], scores[3]};
            const float *const weight[QUERY_TILE] = {scores[0], scores[1], scores[2], scores[3]};
            weigh(score, q + i, queries, s->k + block, d, KEYS);
            size_t visible = 0;
            for (size_t j = 0; j < queries; j++) {
                visible = seen[i + j] > start ? smaller(KEYS, seen[i + j] - start) : 0; // grows with j
                float shrink = soften(scores[j], visible, scale, &max[i + j], &sum[i + j]);
                for (size_t c = 0; c < d; c++) {
                    out[i + j][c] *= shrink;
                }
            }
            weigh(out + i, weight, queries, s->v + block, visible, d);
        }
    }
    for (size_t i = 0; i < count; i++) {
        for (size_t c = 0; c < d; c++) {
            out[i][c] /= sum[i];
        }
    }
}

// attended (T, Q): each token's queries against the keys and values of all positions up to its own
static void attention(const Model *m, State *s, size_t layer, size_t pos, size_t T)
{
    size_t queries = T * (m->h.n_heads / m->h.n_kv_heads); // for each head of keys
#pragma omp for collapse(2) schedule(dynamic)
    for (size_t g = 0; g < m->h.n_kv_heads; g++) {
        for (size_t first = 0; first < queries; first += QUERIES) {
            attend(m, s, layer, g, first, smaller(QUERIES, queries - first), pos);
        }
    }
}

// hidden = silu(gate) * up, silu(x) = x / (1 + e^-x)           (Shazeer 2020)
static void swiglu(float *hidden, const float *gate_up, size_t T, size_t F)
{
#pragma omp for
    for (size_t t = 0; t < T; t++) {
        const float *gate = gate_up + t * 2 * F, *up = gate + F;
        for (size_t i = 0; i < F; i++) {
            float e = exp_negative(-fabsf(gate[i]));
            float sigmoid = (gate[i] < 0 ? e : 1.0f) / (1.0f + e);
            hidden[t * F + i] = gate[i] * sigmoid * up[i];
        }
    }
}

// ------------------------------------------------------------------------------------------------
// 3 The forward pass

// How much context fits, after an allocation for `context` positions failed.
static _Noreturn void die_of_context(const Model *m, size_t context, double bytes)
{
    size_t fits = context / 2;
    for (; fits; fits /= 2) {
        void *trial = malloc((size_t)(bytes / (double)context * (double)fits));
        if (trial) {
            free(trial);
            break;
        }
    }
    die(CANNOT, "%s: no memory for the KV cache: %zu positions need %.1f MB; -c %zu would fit", m->path, context,
        bytes / 1e6, fits);
}

static State open_state(const Model *m, size_t context, int threads)
{
    size_t D = m->h.dim, F = m->h.hidden_dim, Q = m->q_dim, K = m->kv_dim, d = m->h.head_dim;
    size_t widest = larger(larger(D, Q), F);
    State s = {.threads = threads, .context = (context + KEYS - 1) / KEYS * KEYS};

    double cache_bytes = 2.0 * m->h.n_layers * (double)K * (double)s.context * sizeof(uint16_t);
    size_t cache = m->h.n_layers * K * s.context;
    s.k = cache_bytes < 0x1p62 ? calloc(cache, sizeof *s.k) : NULL;
    s.v = cache_bytes < 0x1p62 ? calloc(cache, sizeof *s.v) : NULL;
    if (!s.k || !s.v) {
        free(s.k);
        free(s.v);
        die_of_context(m, context, cache_bytes);
    }

    size_t per_token = (2 * D + 2 * Q + 2 * K + 3 * F + d) * sizeof(float) + widest * sizeof(uint16_t);
    s.batch = smaller(smaller(larger(BATCH_BYTES / per_token, 1), MAX_BATCH), context);
    const char *what = "the activations";
    s.x = allocate(s.batch * D, sizeof(float), what);
    s.norm = allocate(s.batch * D, sizeof(float), what);
    s.qkv = allocate(s.batch * (Q + 2 * K), sizeof(float), what);
    s.attended = allocate(s.batch * Q, sizeof(float), what);
    s.gate_up = allocate(s.batch * 2 * F, sizeof(float), what);
    s.hidden = allocate(s.batch * F, sizeof(float), what);
    s.logits = allocate(m->h.vocab_size, sizeof(float), what);
    s.cosine = allocate(s.batch * (d / 2), sizeof(float), what);
    s.sine = allocate(s.batch * (d / 2), sizeof(float), what);
    s.narrow = allocate(s.batch * widest, sizeof(uint16_t), what);
    s.wide_size = larger(BLOCK_ROWS * 1024, TILE_ROWS * widest);
    s.wide = allocate((size_t)threads * s.wide_size, sizeof(float), what);
    return s;
}

static void close_state(State *s)
{
    void *const memory[] = {s->k,      s->v,      s->x,      s->norm, s->qkv,    s->attended, s->gate_up,
                            s->hidden, s->logits, s->cosine, s->sine, s->narrow, s->wide};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++) {
        free(memory[i]);
    }
}

// The Transformer, for T <= batch tokens at positions pos, pos + 1, ... Their keys and values join the cache;
// what the last layer says of each token is left in s->x (T, D).
static void forward(const Model *m, State *s, const uint32_t *tokens, size_t T, size_t pos)
{
    const float eps = m->h.norm_eps;
#pragma omp parallel num_threads(s->threads)
    {
        embed(s->x, m->embedding, tokens, T);
        rope_table(&m->h, s, pos, T);
        for (size_t i = 0; i < m->h.n_layers; i++) {
            const Layer *l = &m->layers[i];
            rmsnorm(s->norm, s->x, l->attn_norm, T, eps);
            matmul(s->qkv, s->norm, l->wqkv, T, false, s);
            prepare_qkv(m, s, i, pos, T);
            attention(m, s, i, pos, T);
            matmul(s->x, s->attended, l->wo, T, true, s); // x += wo . attended

            rmsnorm(s->norm, s->x, l->ffn_norm, T, eps);
            matmul(s->gate_up, s->norm, l->w_gate_up, T, false, s);
            swiglu(s->hidden, s->gate_up, T, m->h.hidden_dim);
            matmul(s->x, s->hidden, l->w_down, T, true, s); // x += w_down . hidden
        }
    }
}

// The score of every token of the vocabulary to come after token t of the last batch: s->logits (V).
static void classify(const Model *m, State *s, size_t t)
{
#pragma omp parallel num_threads(s->threads)
    {
        rmsnorm(s->norm, s->x + t * m->h.dim, m->final_norm, 1, m->h.norm_eps);
        matmul(s->logits, s->norm, m->classifier, 1, false, s);
    }
}

// Feeds any number of tokens and leaves the logits for the one to come after them.
static void feed(const Model *m, State *s, const uint32_t *tokens, size_t n, size_t pos)
{
    size_t last = 0;
    for (size_t done = 0; done < n; done += last + 1) {
        size_t T = smaller(s->batch, n - done);
        forward(m, s, tokens + done, T, pos + done);
        last = T - 1;
    }
    classify(m, s, last);
}

// ------------------------------------------------------------------------------------------------
// 4 Sampling

// A binary heap: the item with the largest key is on top, of equal ones that with the smallest index.
typedef struct {
    float key;
    uint32_t index, length; // length is the tokenizer's
} Item;

typedef struct {
    Item *items;
    size_t n, capacity;
} Heap;

static bool above(Item a, Item b)
{
    return a.key > b.key || (a.key == b.key && a.index < b.index);
}

static void heap_push(Heap *heap, Item item)
{
    if (heap->n == heap->capacity) {
        heap->capacity = 2 * heap->capacity + 64;
        heap->items = realloc(heap->items, heap->capacity * sizeof *heap->items);
        if (!heap->items) {
            die(CANNOT, "no memory for a heap of %zu items", heap->capacity);
        }
    }
    size_t i = heap->n++;
    for (; i > 0 && above(item, heap->items[(i - 1) / 2]); i = (i - 1) / 2) {
        heap->items[i] = heap->items[(i - 1) / 2];
    }
    heap->items[i] = item;
}

static Item heap_pop(Heap *heap)
{
    Item top = heap->items[0], last = heap->items[--heap->n];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child + 1 < heap->n && above(heap->items[child + 1], heap->items[child])) {
            child++;
        }
        if (child >= heap->n || !above(heap->items[child], last)) {
            break;
        }
        heap->items[i] = heap->items[child];
        i = child;
    }
    heap->items[i] = last;
    return top;
}

typedef struct {
    float temperature, top_p;
    size_t top_k;
    uint64_t random; // the generator's state, at first the seed
    Heap heap;
    Item *kept; // (V)
} Sampler;

// A number in [0, 1): splitmix64 (Steele, Lea and Flood 2014), whose state may start anywhere.
static float random_f32(uint64_t *state)
{
    uint64_t z = (*state += 0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    z ^= z >> 31;
    return (float)(z >> 40) * 0x1p-24f;
}

// The most likely token. Logits that are not finite mean that the weights are damaged, or overflow.
static size_t argmax(const float *logits, size_t n)
{
    size_t best = 0;
    for (size_t i = 0; i < n; i++) {
        if (!(fabsf(logits[i]) <= FLT_MAX)) {
            die(CANNOT, "the logit of token %zu is not finite (%f): the weights hold NaN or are too large", i,
                (double)logits[i]);
        }
        if (logits[i] > logits[best]) {
            best = i;
        }
    }
    return best;
}

// Keeps the likeliest tokens: first top_k of them, then as few as together have top_p of what is left. They come
// off a heap, so the vocabulary is never sorted as a whole. Returns how many are in s->kept, likeliest first.
static size_t keep_likeliest(Sampler *s, const float *p, size_t n)
{
    bool nucleus = s->top_p > 0 && s->top_p < 1;
    // Without top_k, a token below this cannot be in the nucleus: the others would have to make up for more than 1.
    float least = s->top_k ? 0.0f : (1.0f - s->top_p) / (float)n;
    s->heap.n = 0;
    for (size_t i = 0; i < n; i++) {
        if (p[i] >= least) {
            heap_push(&s->heap, (Item){.key = p[i], .index = (uint32_t)i});
        }
    }
    size_t limit = s->top_k ? smaller(s->top_k, n) : n;
    double mass = 0, enough = s->top_k || !nucleus ? DBL_MAX : (double)s->top_p;
    size_t count = 0;
    while (count < limit && s->heap.n && mass < enough) {
        s->kept[count] = heap_pop(&s->heap);
        mass += (double)s->kept[count++].key;
    }
    if (s->top_k && nucleus) {
        enough = mass * (double)s->top_p;
        mass = 0;
        limit = count;
        for (count = 0; count < limit && mass < enough; count++) {
            mass += (double)s->kept[count].key;
        }
    }
    return count;
}

// The next token. Turns the logits (n) into probabilities on the way.
static uint32_t sample(Sampler *s, float *logits, size_t n)
{
    size_t best = argmax(logits, n);
    if (s->temperature == 0) {
        return (uint32_t)best;
    }
    float max = logits[best];
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        logits[i] = exp_negative((logits[i] - max) / s->temperature);
        sum += (double)logits[i];
    }
    for (size_t i = 0; i < n; i++) {
        logits[i] = (float)((double)logits[i] / sum);
    }
    double coin = (double)random_f32(&s->random);
    if (s->top_k == 0 && (s->top_p <= 0 || s->top_p >= 1)) {
        for (size_t i = 0; i < n; i++) {
            coin -= (double)logits[i];
            if (coin < 0) {
                return (uint32_t)i;
            }
        }
        return (uint32_t)best; // only rounding leads here
    }
    size_t count = keep_likeliest(s, logits, n);
    double mass = 0;
    for (size_t i = 0; i < count; i++) {
        mass += (double)s->kept[i].key;
    }
    coin *= mass;
    for (size_t i = 0; i < count; i++) {
        coin -= (double)s->kept[i].key;
        if (coin < 0) {
            return s->kept[i].index;
        }
    }
    return s->kept[0].index; // likewise
}

// ------------------------------------------------------------------------------------------------
// 5 The tokenizer

typedef struct {
    const unsigned char *bytes;
    size_t n;
} Text;

enum { SENTENCEPIECE_BPE = 1 };                                             // TokenizerHeader.kind
enum { ADD_BOS = 1, ADD_SPACE = 2, ALL_TOKENIZER_FLAGS = 3 };               // TokenizerHeader.flags
enum { NORMAL = 1, UNKNOWN = 2, CONTROL = 3, UNUSED = 5, BYTE = 6 };        // Piece.type, as SentencePiece counts
enum { MAX_STOPS = 7, MAX_TEXT = 1 << 30, NO_TOKEN = UINT32_MAX >> 1 };

// The start of a tokenizer file, byte for byte. For each token in order follow: u32 length, u32 type, f32 score,
// and as many bytes as length says: what the token prints.
typedef struct {
    char magic[8]; // "twotoken"
    uint32_t version, kind, flags, vocab_size;
    int32_t bos_id, unk_id; // -1: none
    uint32_t n_stops;
    int32_t stop_ids[MAX_STOPS];
    uint64_t file_size, vocab_hash;
} TokenizerHeader;
_Static_assert(sizeof(TokenizerHeader) == 80, "the compiler added padding to TokenizerHeader");

typedef struct {
    Text text; // inside the mapped file
    uint32_t type;
    float score; // of two neighbours, the pair that makes the piece of the highest score is merged first
} Piece;

typedef struct {
    const char *path;
    TokenizerHeader h;
    Piece *pieces;         // (V)
    uint32_t *table;       // (table_mask + 1) a hash table of the normal pieces' ids, NO_TOKEN where empty
    size_t table_mask;     //
    size_t longest;        // bytes of the longest normal piece
    bool words;            // no piece has a space after something else
    uint32_t byte_id[256]; // unk_id if there are no byte tokens
} Tokenizer;

// FNV-1a, to find pieces, and to tell one vocabulary from another.
static uint64_t hash_bytes(Text text)
{
    uint64_t hash = 0xcbf29ce484222325;
    for (size_t i = 0; i < text.n; i++) {
        hash = (hash ^ text.bytes[i]) * 0x100000001b3;
    }
    return hash;
}

// The place in the table of the piece with this text, or the empty place where it would go.
static uint32_t *find_place(const Tokenizer *t, Text text)
{
    size_t i = hash_bytes(text) & t->table_mask;
    while (t->table[i] != NO_TOKEN) {
        Text other = t->pieces[t->table[i]].text;
        if (other.n == text.n && !memcmp(other.bytes, text.bytes, text.n)) {
            break;
        }
        i = (i + 1) & t->table_mask;
    }
    return &t->table[i];
}

static uint32_t find_piece(const Tokenizer *t, Text text)
{
    return text.n > t->longest ? NO_TOKEN : *find_place(t, text);
}

static void check_id(const Tokenizer *t, const char *name, int64_t id, int64_t min)
{
    if (id < min || id >= (int64_t)t->h.vocab_size) {
        die(CANNOT, "%s: %s: expected %lld to %u, found %lld", t->path, name, (long long)min, t->h.vocab_size - 1,
            (long long)id);
    }
}

static void check_tokenizer_header(const Tokenizer *t, size_t size)
{
    const TokenizerHeader *h = &t->h;
    if (h->version != 1 || h->kind != SENTENCEPIECE_BPE || h->flags > ALL_TOKENIZER_FLAGS || h->n_stops > MAX_STOPS) {
        die(CANNOT, "%s: expected version 1, kind 1, flags to %d, stop ids to %d, found %u, %u, %u, %u", t->path,
            ALL_TOKENIZER_FLAGS, MAX_STOPS, h->version, h->kind, h->flags, h->n_stops);
    }
    if (h->file_size != size) {
        die(CANNOT, "%s: file size: expected %llu bytes by its header, found %zu: incomplete or damaged", t->path,
            (unsigned long long)h->file_size, size);
    }
    if (h->vocab_size < 1 || h->vocab_size > 1 << 24) {
        die(CANNOT, "%s: vocab_size: expected 1 to %d, found %u", t->path, 1 << 24, h->vocab_size);
    }
    check_id(t, "bos_id", h->bos_id, h->flags & ADD_BOS ? 0 : -1);
    check_id(t, "unk_id", h->unk_id, -1);
    for (size_t i = 0; i < h->n_stops; i++) {
        check_id(t, "stop id", h->stop_ids[i], 0);
    }
}

// Reads one entry of the vocabulary at `at` and returns where the next one starts.
static size_t read_piece(const Tokenizer *t, const unsigned char *file, size_t size, size_t at, uint32_t id)
{
    struct {
        uint32_t length, type;
        float score;
    } entry;
    if (size - at < sizeof entry) {
        die(CANNOT, "%s: token %u: expected %zu bytes, found %zu", t->path, id, sizeof entry, size - at);
    }
    memcpy(&entry, file + at, sizeof entry);
    at += sizeof entry;
    if (entry.length > size - at || (entry.length == 0 && entry.type != UNUSED)) {
        die(CANNOT, "%s: token %u: length: expected 1 to %zu, found %u", t->path, id, size - at, entry.length);
    }
    if (entry.type < NORMAL || entry.type > BYTE || entry.type == 4) {
        die(CANNOT, "%s: token %u: type: expected 1, 2, 3, 5 or 6, found %u", t->path, id, entry.type);
    }
    if (entry.type == BYTE && entry.length != 1) {
        die(CANNOT, "%s: token %u: a byte token: expected length 1, found %u", t->path, id, entry.length);
    }
    if (isnan(entry.score)) {
        die(CANNOT, "%s: token %u: score: expected a number, found NaN", t->path, id);
    }
    t->pieces[id] = (Piece){{file + at, entry.length}, entry.type, entry.score};
    return at + entry.length;
}

static Tokenizer open_tokenizer(const char *path)
{
    Tokenizer t = {.path = path};
    size_t size;
    const unsigned char *file = map_file(path, sizeof t.h, "a tokenizer file made by export.py", &size);
    memcpy(&t.h, file, sizeof t.h);
    check_magic(path, "twotoken", t.h.magic, "a tokenizer file");
    check_tokenizer_header(&t, size);

    t.pieces = allocate(t.h.vocab_size, sizeof *t.pieces, "the vocabulary");
    size_t at = sizeof t.h;
    for (uint32_t id = 0; id < t.h.vocab_size; id++) {
        at = read_piece(&t, file, size, at, id);
    }
    if (at != size) {
        die(CANNOT, "%s: expected %zu bytes for %u tokens, found %zu", path, at, t.h.vocab_size, size);
    }
    uint64_t hash = hash_bytes((Text){file + sizeof t.h, size - sizeof t.h});
    if (hash != t.h.vocab_hash) {
        die(CANNOT, "%s: hash of the vocabulary: expected %016llx, found %016llx: damaged", path,
            (unsigned long long)t.h.vocab_hash, (unsigned long long)hash);
    }

    for (t.table_mask = 1; t.table_mask < 2 * (size_t)t.h.vocab_size; t.table_mask *= 2) {
    }
    t.table = allocate(t.table_mask, sizeof *t.table, "the vocabulary");
    for (size_t i = 0; i < t.table_mask; i++) {
        t.table[i] = NO_TOKEN;
    }
    t.table_mask--;
    for (size_t b = 0; b < 256; b++) {
        t.byte_id[b] = (uint32_t)t.h.unk_id;
    }
    size_t n_bytes = 0;
    t.words = true;
    for (uint32_t id = 0; id < t.h.vocab_size; id++) {
        Text text = t.pieces[id].text;
        if (t.pieces[id].type == BYTE) {
            n_bytes += t.byte_id[*text.bytes] == (uint32_t)t.h.unk_id;
            t.byte_id[*text.bytes] = id;
        }
        if (t.pieces[id].type != NORMAL || *find_place(&t, text) != NO_TOKEN) {
            continue;
        }
        *find_place(&t, text) = id;
        t.longest = larger(t.longest, text.n);
        for (size_t i = 1; i < text.n; i++) {
            t.words = t.words && !(text.bytes[i] == ' ' && text.bytes[i - 1] != ' ');
        }
    }
    if (n_bytes != 256 && (n_bytes != 0 || t.h.unk_id < 0)) {
        die(CANNOT, "%s: byte tokens: expected one for each byte, or none and an unk_id, found %zu", path, n_bytes);
    }
    return t;
}

// The length of the UTF-8 character that starts here; 0 if none can; -1 if one might, with more bytes.
static int utf8_length(Text text)
{
    unsigned char lead = text.bytes[0];
    int length = lead < 0x80 ? 1 : lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
    // The second byte rules out overlong forms, surrogates, and what is beyond U+10FFFF.
    unsigned char low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    unsigned char high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    for (int i = 1; i < length; i++) {
        if ((size_t)i == text.n) {
            return -1;
        }
        if (text.bytes[i] < low || text.bytes[i] > high) {
            return 0;
        }
        low = 0x80;
        high = 0xbf;
    }
    return length;
}

// The text as the vocabulary sees it: "▁", by which SentencePiece means a space, becomes one; a space in front.
static Text normalise(const Tokenizer *t, Text text)
{
    unsigned char *out = allocate(text.n + 1, 1, "the prompt");
    size_t n = 0;
    if (t->h.flags & ADD_SPACE && text.n > 0) {
        out[n++] = ' ';
    }
    for (size_t i = 0; i < text.n;) {
        if (text.n - i >= 3 && !memcmp(text.bytes + i, "\xe2\x96\x81", 3)) {
            out[n++] = ' ';
            i += 3;
        } else {
            out[n++] = text.bytes[i++];
        }
    }
    return (Text){out, n};
}

// A piece of text on its way to becoming tokens; neighbours are linked by their index, NO_TOKEN at the ends.
typedef struct {
    Text text; // empty once it has become part of the symbol before it
    uint32_t previous, next;
} Symbol;

typedef struct {
    Symbol *symbols;
    size_t capacity;
    Heap pairs; // key: the score of the piece that two neighbours would make, index: the first of them
} Bpe;

static void push_pair(const Tokenizer *t, Bpe *bpe, uint32_t first)
{
    uint32_t second = first == NO_TOKEN ? NO_TOKEN : bpe->symbols[first].next;
    if (second != NO_TOKEN) {
        Text pair = {bpe->symbols[first].text.bytes, bpe->symbols[first].text.n + bpe->symbols[second].text.n};
        uint32_t id = find_piece(t, pair);
        if (id != NO_TOKEN) {
            heap_push(&bpe->pairs, (Item){t->pieces[id].score, first, (uint32_t)pair.n});
        }
    }
}

// Byte-pair encoding: starts from characters and merges the pair of the highest score, the leftmost of equals, until
// none is left. A heap finds it, so it takes n log n steps. Adds to the `n_tokens` tokens and returns their new number.
//                                                                             (Sennrich, Haddow and Birch 2016)
static size_t encode_word(const Tokenizer *t, Bpe *bpe, Text word, uint32_t *tokens, size_t n_tokens)
{
    if (word.n > bpe->capacity) {
        bpe->capacity = 2 * word.n;
        free(bpe->symbols);
        bpe->symbols = allocate(bpe->capacity, sizeof *bpe->symbols, "the prompt");
    }
    Symbol *symbols = bpe->symbols;
    uint32_t n = 0;
    for (size_t i = 0; i < word.n; n++) {
        int length = utf8_length((Text){word.bytes + i, word.n - i});
        size_t bytes = length > 0 ? (size_t)length : 1; // a byte that is no part of a character stands for itself
        symbols[n] = (Symbol){{word.bytes + i, bytes}, n ? n - 1 : NO_TOKEN, n + 1};
        i += bytes;
    }
    symbols[n - 1].next = NO_TOKEN;
    for (uint32_t i = 0; i < n; i++) {
        push_pair(t, bpe, i);
    }
    while (bpe->pairs.n) {
        Item pair = heap_pop(&bpe->pairs);
        Symbol *first = &symbols[pair.index];
        if (first->text.n == 0 || first->next == NO_TOKEN ||
            first->text.n + symbols[first->next].text.n != pair.length) {
            continue; // one of the two has been merged with another since
        }
        Symbol *second = &symbols[first->next];
        first->text.n = pair.length;
        second->text.n = 0;
        first->next = second->next;
        if (first->next != NO_TOKEN) {
            symbols[first->next].previous = pair.index;
        }
        push_pair(t, bpe, first->previous);
        push_pair(t, bpe, pair.index);
    }
    for (uint32_t i = 0; i != NO_TOKEN; i = symbols[i].next) {
        uint32_t id = find_piece(t, symbols[i].text);
        if (id != NO_TOKEN) {
            tokens[n_tokens++] = id;
            continue;
        }
        for (size_t b = 0; b < symbols[i].text.n; b++) { // a character that is no token: one for each of its bytes
            id = t->byte_id[symbols[i].text.bytes[b]];
            if (id != (uint32_t)t->h.unk_id || n_tokens == 0 || tokens[n_tokens - 1] != id) { // but one <unk> for many
                tokens[n_tokens++] = id;
            }
        }
    }
    return n_tokens;
}

// The tokens of a text, for the caller to free. Whatever the text says, they are never control tokens: those are
// not in the table.
static uint32_t *encode(const Tokenizer *t, Text text, size_t *n)
{
    if (text.n > MAX_TEXT) {
        die(CANNOT, "the prompt: expected at most %d bytes, found %zu", MAX_TEXT, text.n);
    }
    Text all = normalise(t, text);
    uint32_t *tokens = allocate(all.n + 1, sizeof *tokens, "the prompt");
    *n = 0;
    if (t->h.flags & ADD_BOS) {
        tokens[(*n)++] = (uint32_t)t->h.bos_id;
    }
    Bpe bpe = {0};
    for (size_t start = 0; start < all.n;) {
        // No merge can reach across the start of a word, so words can be taken one by one.
        size_t stop = start + 1;
        while (stop < all.n && !(t->words && all.bytes[stop] == ' ' && all.bytes[stop - 1] != ' ')) {
            stop++;
        }
        *n = encode_word(t, &bpe, (Text){all.bytes + start, stop - start}, tokens, *n);
        start = stop;
    }
    free(bpe.symbols);
    free(bpe.pairs.items);
    free((void *)all.bytes);
    return tokens;
}

// What a token prints. The space that encode put in front of the text is taken off again.
static Text decode(const Tokenizer *t, uint32_t token, bool first)
{
    const Piece *piece = &t->pieces[token];
    bool silent = piece->type == CONTROL || piece->type == UNKNOWN || piece->type == UNUSED;
    bool skip = first && t->h.flags & ADD_SPACE && piece->text.n && piece->text.bytes[0] == ' ';
    return silent ? (Text){piece->text.bytes, 0} : (Text){piece->text.bytes + skip, piece->text.n - skip};
}

// ------------------------------------------------------------------------------------------------
// 6 Modes

typedef struct {
    const char *model, *tokenizer, *mode;
    const char *prompt, *prompt_file;
    float temperature, top_p;
    size_t top_k, steps, context;
    int threads;
    uint64_t seed;
    bool json;
} Options;

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// Streams text without ever splitting a character: the bytes of one that is not complete yet wait in `pending`.
typedef struct {
    bool terminal;
    unsigned char pending[4];
    size_t n;
} Printer;

// A terminal must not obey what a model says, so control characters are shown as \x1b, and so are stray bytes.
static void print_character(const Printer *p, Text c, bool valid)
{
    unsigned char b = c.bytes[0];
    bool control = (b < 0x20 && b != '\n' && b != '\t') || b == 0x7f || (b == 0xc2 && c.n == 2 && c.bytes[1] < 0xa0);
    if (p->terminal && (control || !valid)) {
        for (size_t i = 0; i < c.n; i++) {
            printf("\\x%02x", c.bytes[i]);
        }
    } else {
        fwrite(c.bytes, 1, c.n, stdout);
    }
}

// Prints what is complete of the pending bytes, or, at the end of the text, all of them.
static void print_pending(Printer *p, bool end)
{
    while (p->n) {
        int length = utf8_length((Text){p->pending, p->n});
        if (length < 0 && !end) {
            return;
        }
        size_t n = length > 0 ? (size_t)length : 1;
        print_character(p, (Text){p->pending, n}, length > 0);
        p->n -= n;
        memmove(p->pending, p->pending + n, p->n);
    }
}

static void print_text(Printer *p, Text text)
{
    for (size_t i = 0; i < text.n; i++) {
        p->pending[p->n++] = text.bytes[i];
        print_pending(p, false);
    }
}

// A JSON string; what is not UTF-8 becomes U+FFFD, as JSON has no way to say it.
static void print_json_string(Text text)
{
    putchar('"');
    for (size_t i = 0; i < text.n;) {
        int length = utf8_length((Text){text.bytes + i, text.n - i});
        unsigned char c = text.bytes[i];
        if (length <= 0) {
            fputs("\\ufffd", stdout);
            i++;
            continue;
        }
        if (c < 0x20 || c == 0x7f) {
            printf("\\u%04x", c);
        } else {
            fputs(c == '"' || c == '\\' ? "\\" : "", stdout);
            fwrite(text.bytes + i, 1, (size_t)length, stdout);
        }
        i += (size_t)length;
    }
    putchar('"');
}

static void finish_output(void)
{
    if (fflush(stdout) || ferror(stdout)) {
        die(CANNOT, "standard output: cannot write: %s", strerror(errno));
    }
}

// The prompt, from -i or -f, or an empty one.
static Text read_prompt(const Options *o)
{
    if (!o->prompt_file) {
        const char *prompt = o->prompt ? o->prompt : "";
        return (Text){(const unsigned char *)prompt, strlen(prompt)};
    }
    bool standard_input = !strcmp(o->prompt_file, "-");
    FILE *file = standard_input ? stdin : fopen(o->prompt_file, "rb");
    unsigned char *bytes = NULL;
    size_t n = 0, capacity = 0;
    while (file && !feof(file) && !ferror(file)) {
        if (n == capacity) {
            capacity = 2 * capacity + 65536;
            bytes = capacity > 4 * (size_t)MAX_TEXT ? NULL : realloc(bytes, capacity);
            if (!bytes) {
                die(CANNOT, "%s: no memory for %zu bytes, or more than a prompt may have", o->prompt_file, capacity);
            }
        }
        n += fread(bytes + n, 1, capacity - n, file);
    }
    if (!file || ferror(file)) {
        die(CANNOT, "%s: cannot read the prompt: %s", o->prompt_file, strerror(errno));
    }
    if (!standard_input) {
        fclose(file);
    }
    return (Text){bytes, n};
}

// The ids of the prompt on one line, as the model would receive them.
static void tokenize(const Tokenizer *t, const Options *o)
{
    size_t n;
    uint32_t *tokens = encode(t, read_prompt(o), &n);
    if (o->json) {
        fputs("{\"tokens\": [", stdout);
    }
    for (size_t i = 0; i < n; i++) {
        printf("%s%u", i == 0 ? "" : o->json ? ", " : " ", tokens[i]);
    }
    if (o->json) {
        fputs("], \"pieces\": [", stdout);
        for (size_t i = 0; i < n; i++) {
            fputs(i ? ", " : "", stdout);
            print_json_string(t->pieces[tokens[i]].text);
        }
        fputs("]}", stdout);
    }
    putchar('\n');
    free(tokens);
}

static bool is_stop(const Tokenizer *t, uint32_t token)
{
    bool stop = t->h.bos_id >= 0 && token == (uint32_t)t->h.bos_id;
    for (size_t i = 0; i < t->h.n_stops; i++) {
        stop = stop || token == (uint32_t)t->h.stop_ids[i];
    }
    return stop;
}

// ln(probability) of a token, from the logits (V)
static double log_probability(const float *logits, size_t n, uint32_t token)
{
    double max = (double)logits[argmax(logits, n)], sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += exp((double)logits[i] - max);
    }
    return (double)logits[token] - max - log(sum);
}

// Prints the prompt and what follows it, to -n tokens in all, to a stop, or to the end of the context.
static void generate(const Model *m, const Tokenizer *t, const Options *o)
{
    size_t n;
    uint32_t *tokens = encode(t, read_prompt(o), &n);
    size_t context = o->context ? o->context : m->h.max_seq_len;
    size_t limit = o->steps ? smaller(o->steps, context) : context;
    if (n == 0) {
        die(USAGE, "an empty prompt: expected text (-i or -f), as this tokenizer has no bos token to start from");
    }
    if (n > limit) {
        die(CANNOT, "the prompt: expected at most %zu tokens (%s), found %zu", limit,
            limit == context ? "the context, -c" : "-n", n);
    }
    State s = open_state(m, limit, o->threads);
    size_t vocab = m->h.vocab_size;
    Sampler sampler = {o->temperature, o->top_p, o->top_k, o->seed, {0}, allocate(vocab, sizeof(Item), "sampling")};
    Printer printer = {.terminal = isatty(STDOUT_FILENO)};
    bool first = true;
    for (size_t i = 0; i < n && !o->json; i++) {
        Text text = decode(t, tokens[i], first);
        print_text(&printer, text);
        first = first && t->pieces[tokens[i]].type == CONTROL;
    }
    finish_output();

    double start = seconds();
    feed(m, &s, tokens, n, 0);
    double prompt_time = seconds() - start;
    start = seconds();
    size_t made = 0;
    bool stopped = false;
    for (;;) {
        double log_p = 0;
        uint32_t token;
        if (o->json) {
            float *copy = allocate(vocab, sizeof *copy, "sampling");
            memcpy(copy, s.logits, vocab * sizeof *copy);
            token = sample(&sampler, s.logits, vocab);
            log_p = log_probability(copy, vocab, token);
            free(copy);
        } else {
            token = sample(&sampler, s.logits, vocab);
        }
        made++;
        stopped = is_stop(t, token);
        Text text = decode(t, token, first);
        first = false;
        if (o->json) {
            printf("{\"id\": %u, \"text\": ", token);
            print_json_string(text);
            printf(", \"logprob\": %.6f}\n", log_p);
        } else if (!stopped) {
            print_text(&printer, text);
        }
        finish_output();
        if (stopped || n + made > limit) {
            break;
        }
        feed(m, &s, &token, 1, n + made - 1);
    }
    if (!o->json) {
        print_pending(&printer, true);
        putchar('\n');
    }
    finish_output();
    double time = seconds() - start;
    if (!stopped && limit == context && (o->steps == 0 || o->steps > context)) {
        fprintf(stderr, "run: the context of %zu tokens is full\n", context);
    }
    fprintf(stderr, "\nprompt %zu tokens, %.1f tok/s; generated %zu tokens, %.1f tok/s; seed %llu\n", n,
            (double)n / prompt_time, made, (double)made / time, (unsigned long long)o->seed);
    free(sampler.heap.items);
    free(sampler.kept);
    close_state(&s);
    free(tokens);
}

// ------------------------------------------------------------------------------------------------
// 7 The command line

static const char usage[] =
    "usage: run [MODEL] [options]        MODEL is a weights file (default: " DEFAULT_MODEL ")\n"
    "\n"
    "what to do\n"
    "  -m MODE    generate (default): continue the prompt\n"
    "             tokenize: print the prompt's token ids\n"
    "  -i TEXT    the prompt (default: empty, the model begins)\n"
    "  -f FILE    the prompt from a file, - for standard input\n"
    "  -n N       stop after N tokens, the prompt included (default 256, 0 = fill the context)\n"
    "  --json     print JSON: an object a token, or one for tokenize\n"
    "\n"
    "sampling\n"
    "  -t T       temperature (default 1.0, 0 = always the likeliest token)\n"
    "  -p P       top-p: sample from the likeliest tokens that have P together (default 0.9, 1 = off)\n"
    "  -k K       top-k: sample from the K likeliest tokens (default 0 = off)\n"
    "  -s SEED    the same seed gives the same text (default: the time)\n"
    "\n"
    "the machine\n"
    "  -c N       context length in tokens (default: the model's)\n"
    "  -j N       threads (default: the physical cores this process may use)\n"
    "  -z FILE    tokenizer file (default: MODEL.tokenizer.bin, or tokenizer.bin beside it or here)\n"
    "  -h, --help, --version\n"
    "\n"
    "examples\n"
    "  run model.bin -i \"Once upon a time\" -t 0.8 -s 42\n"
    "  run model.bin -m tokenize -f book.txt --json\n";

// Hyper-threads of a core share its arithmetic and its path to memory, so one thread a core is best.
static int physical_cores(void)
{
#ifdef __linux__
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) {
        return 1;
    }
    int cores = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &allowed)) {
            continue;
        }
        char path[96];
        int sibling = cpu; // the first hyper-thread of its core
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
        FILE *file = fopen(path, "r");
        if (file) {
            if (fscanf(file, "%d", &sibling) != 1 || sibling < 0 || sibling >= CPU_SETSIZE) {
                sibling = cpu;
            }
            fclose(file);
        }
        cores += sibling == cpu || !CPU_ISSET(sibling, &allowed);
    }
    return cores > 0 ? cores : 1;
#else
    return (int)larger(1, (size_t)sysconf(_SC_NPROCESSORS_ONLN));
#endif
}

static long long parse_integer(const char *flag, const char *text, long long min, long long max)
{
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    if (end == text || *end || errno || value < min || value > max) {
        die(USAGE, "%s: expected a whole number from %lld to %lld, found '%s'", flag, min, max, text);
    }
    return value;
}

static float parse_number(const char *flag, const char *text, double min, double max)
{
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= min && value <= max)) {
        die(USAGE, "%s: expected a number from %g to %g, found '%s'", flag, min, max, text);
    }
    return (float)value;
}

static Options parse_options(int argc, char **argv)
{
    Options o = {.mode = "generate", .temperature = 1.0f, .top_p = 0.9f, .steps = 256, .threads = physical_cores()};
    o.seed = (uint64_t)time(NULL);
    for (int i = 1; i < argc; i++) {
        const char *flag = argv[i];
        if (*flag != '-') {
            if (o.model) {
                die(USAGE, "expected one MODEL, found '%s' and '%s'", o.model, flag);
            }
            o.model = flag;
            continue;
        }
        if (!strcmp(flag, "-h") || !strcmp(flag, "--help")) {
            fputs(usage, stdout);
            finish_output();
            exit(0);
        }
        if (!strcmp(flag, "--version")) {
            printf("twofiles %s, %s\n", VERSION, isa());
            finish_output();
            exit(0);
        }
        if (!strcmp(flag, "--json")) {
            o.json = true;
            continue;
        }
        if (strlen(flag) != 2 || !strchr("tpknsifzmcj", flag[1])) {
            die(USAGE, "unknown flag '%s'", flag);
        }
        const char *value = argv[++i];
        if (!value) {
            die(USAGE, "%s: expected a value, found the end of the command line", flag);
        }
        switch (flag[1]) {
        case 't': o.temperature = parse_number(flag, value, 0, 1e6); break;
        case 'p': o.top_p = parse_number(flag, value, 0, 1); break;
        case 'k': o.top_k = (size_t)parse_integer(flag, value, 0, INT32_MAX); break;
        case 'n': o.steps = (size_t)parse_integer(flag, value, 0, INT32_MAX); break;
        case 's': o.seed = (uint64_t)parse_integer(flag, value, 0, INT64_MAX); break;
        case 'i': o.prompt = value; break;
        case 'f': o.prompt_file = value; break;
        case 'z': o.tokenizer = value; break;
        case 'm': o.mode = value; break;
        case 'c': o.context = (size_t)parse_integer(flag, value, 1, INT32_MAX); break;
        case 'j': o.threads = (int)parse_integer(flag, value, 1, 1024); break;
        }
    }
    if (o.prompt && o.prompt_file) {
        die(USAGE, "expected one of -i and -f, found both");
    }
    if (strcmp(o.mode, "generate") && strcmp(o.mode, "tokenize")) {
        die(USAGE, "-m: expected generate or tokenize, found '%s'", o.mode);
    }
    return o;
}

// The tokenizer file: -z FILE, else MODEL.tokenizer.bin beside MODEL.bin, else tokenizer.bin beside it, else here.
// For the caller to free.
static char *tokenizer_path(const Options *o)
{
    if (o->tokenizer) {
        return strdup(o->tokenizer);
    }
    size_t stem = strlen(o->model);
    if (stem > 4 && !strcmp(o->model + stem - 4, ".bin")) {
        stem -= 4;
    }
    const char *slash = strrchr(o->model, '/');
    size_t folder = slash ? (size_t)(slash - o->model) + 1 : 0;
    size_t size = strlen(o->model) + sizeof ".tokenizer.bin";
    char *path = allocate(size, 1, "a path");
    const struct {
        size_t kept;
        const char *name;
    } tries[] = {{stem, ".tokenizer.bin"}, {folder, "tokenizer.bin"}, {0, "tokenizer.bin"}};
    for (size_t i = 0; i < sizeof tries / sizeof *tries; i++) {
        snprintf(path, size, "%.*s%s", (int)tries[i].kept, o->model, tries[i].name);
        if (!access(path, F_OK)) {
            return path;
        }
    }
    die(CANNOT, "%s: no tokenizer file: expected %.*s.tokenizer.bin, or tokenizer.bin beside it or here, or -z FILE",
        o->model, (int)stem, o->model);
}

static void check_pair(const Model *m, const Tokenizer *t)
{
    if (m->h.vocab_size != t->h.vocab_size) {
        die(CANNOT, "%s: the wrong tokenizer for %s: expected %u tokens, found %u", t->path, m->path, m->h.vocab_size,
            t->h.vocab_size);
    }
    if (m->h.vocab_hash != t->h.vocab_hash) {
        die(CANNOT, "%s: the wrong tokenizer for %s: expected a vocabulary with hash %016llx, found %016llx", t->path,
            m->path, (unsigned long long)m->h.vocab_hash, (unsigned long long)t->h.vocab_hash);
    }
}

// ------------------------------------------------------------------------------------------------
// 8 Appendix: SIMD
//
// An instruction set is a handful of inlines over vectors of W floats. The two inner loops below are written
// once over them. A sum has one accumulator of W lanes, whatever the tile: so a tile's shape cannot change its bits.

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__) && defined(__AVX512BW__)

#include <immintrin.h>
typedef __m512 vec;
enum { W = 16, TILE_TOKENS = 6, COLUMNS = 4 }; // 24 of 32 registers are sums
INLINE vec set(float x) { return _mm512_set1_ps(x); }
INLINE vec load_f32(const float *p) { return _mm512_loadu_ps(p); }
INLINE vec load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vec load_bf16(const uint16_t *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
INLINE void store(float *p, vec a) { _mm512_storeu_ps(p, a); }
INLINE vec fma_(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float sum_(vec a) { return _mm512_reduce_add_ps(a); }
#ifdef __AVX512BF16__
#define BF16_DOT "AVX-512 BF16"
INLINE vec dot_pairs(vec a, vec b, vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
#endif
#define ISA "AVX-512"

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>
typedef __m256 vec;
enum { W = 8, TILE_TOKENS = 3, COLUMNS = 2 }; // 12 and 8 of 16 registers are sums
INLINE vec set(float x) { return _mm256_set1_ps(x); }
INLINE vec load_f32(const float *p) { return _mm256_loadu_ps(p); }
INLINE vec load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE vec load_bf16(const uint16_t *p)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
INLINE void store(float *p, vec a) { _mm256_storeu_ps(p, a); }
INLINE vec fma_(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE float sum_(vec a)
{
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
#define ISA "AVX2"

#elif defined(__ARM_NEON) && defined(__aarch64__)

#include <arm_neon.h>
typedef float32x4_t vec;
enum { W = 4, TILE_TOKENS = 6, COLUMNS = 4 };
INLINE vec set(float x) { return vdupq_n_f32(x); }
INLINE vec load_f32(const float *p) { return vld1q_f32(p); }
INLINE vec load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INLINE vec load_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
INLINE void store(float *p, vec a) { vst1q_f32(p, a); }
INLINE vec fma_(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
INLINE float sum_(vec a) { return vaddvq_f32(a); }
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#define BF16_DOT "NEON BF16"
INLINE vec dot_pairs(vec a, vec b, vec c)
{
    return vbfdotq_f32(c, vreinterpretq_bf16_f32(a), vreinterpretq_bf16_f32(b));
}
#endif
#define ISA "NEON"

#else // any other machine: the compiler's own vectors, four floats long

typedef float vec __attribute__((vector_size(16)));
enum { W = 4, TILE_TOKENS = 3, COLUMNS = 2 };
INLINE vec set(float x) { return (vec){x, x, x, x}; }
INLINE vec load_f32(const float *p) { return (vec){p[0], p[1], p[2], p[3]}; }
INLINE vec load_f16(const uint16_t *p)
{
    return (vec){f16_to_f32(p[0]), f16_to_f32(p[1]), f16_to_f32(p[2]), f16_to_f32(p[3])};
}
INLINE vec load_bf16(const uint16_t *p)
{
    return (vec){bf16_to_f32(p[0]), bf16_to_f32(p[1]), bf16_to_f32(p[2]), bf16_to_f32(p[3])};
}
INLINE void store(float *p, vec a) { memcpy(p, &a, sizeof a); }
INLINE vec fma_(vec a, vec b, vec c) { return a * b + c; }
INLINE float sum_(vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
#define ISA "portable"

#endif

#ifndef BF16_DOT
INLINE vec dot_pairs(vec a, vec b, vec c) { return fma_(a, b, c); } // never called
#endif

static bool has_bf16_dot(void)
{
#ifdef BF16_DOT
    return true;
#else
    return false;
#endif
}

static const char *isa(void)
{
#ifdef BF16_DOT
    return BF16_DOT;
#else
    return ISA;
#endif
}

// W elements of any type; or, for dot_pairs, 2W of bf16 as they are.
INLINE vec load(const void *array, Dtype dtype, bool pairs, size_t i)
{
    const void *p = element_address(array, dtype, i);
    return pairs || dtype == F32 ? load_f32(p) : dtype == BF16 ? load_bf16(p) : load_f16(p);
}

// One tile: out[t][r] = sum_i w[r][i] x[t][i]. All but the pointers and n is known when it is compiled, so that
// the sums are registers and the loops over r and t are gone.
INLINE void tile_fixed(float *out, size_t out_stride, bool add, const void *w, Dtype w_type, size_t rows, const void *x,
                       Dtype x_type, size_t tokens, size_t n)
{
    const bool pairs = w_type == BF16 && x_type == BF16;
    const size_t step = pairs ? 2 * W : W;
    vec sums[TILE_ROWS][TILE_TOKENS];
    for (size_t r = 0; r < rows; r++) {
        for (size_t t = 0; t < tokens; t++) {
            sums[r][t] = set(0);
        }
    }
    size_t i = 0;
    for (; i + step <= n; i += step) {
        vec a[TILE_ROWS];
        for (size_t r = 0; r < rows; r++) {
            a[r] = load(w, w_type, pairs, r * n + i);
        }
        for (size_t t = 0; t < tokens; t++) {
            vec b = load(x, x_type, pairs, t * n + i);
            for (size_t r = 0; r < rows; r++) {
                sums[r][t] = pairs ? dot_pairs(a[r], b, sums[r][t]) : fma_(a[r], b, sums[r][t]);
            }
        }
    }
    for (size_t r = 0; r < rows; r++) {
        for (size_t t = 0; t < tokens; t++) {
            float sum = sum_(sums[r][t]);
            if (i < n) {
                sum += dot_ref(element_address(w, w_type, r * n + i), w_type, element_address(x, x_type, t * n + i),
                               x_type, n - i);
            }
            float *place = &out[t * out_stride + r];
            *place = add ? *place + sum : sum;
        }
    }
}

// Covers rows by tokens with tiles. The tokens of a tile stay in the first-level cache while the rows pass.
INLINE void tile_typed(float *out, size_t out_stride, bool add, const void *w, Dtype w_type, size_t rows, const void *x,
                       Dtype x_type, size_t tokens, size_t n)
{
    size_t wide = 0; // tokens of this tile: TILE_TOKENS, or 1 for each of the last ones
    for (size_t t = 0; t < tokens; t += wide) {
        wide = tokens - t >= TILE_TOKENS ? TILE_TOKENS : 1;
        const void *x_t = element_address(x, x_type, t * n);
        size_t high = 0;
        for (size_t r = 0; r < rows; r += high) {
            high = rows - r >= TILE_ROWS ? TILE_ROWS : 1;
            float *out_tr = out + t * out_stride + r;
            const void *w_r = element_address(w, w_type, r * n);
            if (high == 1) {
                for (size_t j = 0; j < wide; j++) {
                    tile_fixed(out_tr + j * out_stride, out_stride, add, w_r, w_type, 1,
                               element_address(x_t, x_type, j * n), x_type, 1, n);
                }
            } else if (wide == 1) {
                tile_fixed(out_tr, out_stride, add, w_r, w_type, TILE_ROWS, x_t, x_type, 1, n);
            } else {
                tile_fixed(out_tr, out_stride, add, w_r, w_type, TILE_ROWS, x_t, x_type, TILE_TOKENS, n);
            }
        }
    }
}

static void tile(float *out, size_t out_stride, bool add, const void *w, Dtype w_type, size_t rows, const void *x,
                 Dtype x_type, size_t tokens, size_t n)
{
    if (x_type == BF16) {
        tile_typed(out, out_stride, add, w, BF16, rows, x, BF16, tokens, n);
    } else if (w_type == F32) {
        tile_typed(out, out_stride, add, w, F32, rows, x, F32, tokens, n);
    } else if (w_type == BF16) {
        tile_typed(out, out_stride, add, w, BF16, rows, x, F32, tokens, n);
    } else {
        tile_typed(out, out_stride, add, w, F16, rows, x, F32, tokens, n);
    }
}

// weigh_ref for `columns` vectors of columns and so many queries, both known when it is compiled; x (m, stride)
INLINE void weigh_fixed(float *const *y, const float *const *a, size_t queries, const uint16_t *x, size_t m,
                        size_t stride, size_t first, size_t columns)
{
    vec sums[QUERY_TILE][COLUMNS];
    for (size_t q = 0; q < queries; q++) {
        for (size_t c = 0; c < columns; c++) {
            sums[q][c] = load_f32(y[q] + first + c * W);
        }
    }
    for (size_t j = 0; j < m; j++) {
        vec row[COLUMNS];
        for (size_t c = 0; c < columns; c++) {
            row[c] = load_f16(x + j * stride + first + c * W);
        }
        for (size_t q = 0; q < queries; q++) {
            vec weight = set(a[q][j]);
            for (size_t c = 0; c < columns; c++) {
                sums[q][c] = fma_(weight, row[c], sums[q][c]);
            }
        }
    }
    for (size_t q = 0; q < queries; q++) {
        for (size_t c = 0; c < columns; c++) {
            store(y[q] + first + c * W, sums[q][c]);
        }
    }
}

static void weigh(float *const *y, const float *const *a, size_t queries, const uint16_t *x, size_t m, size_t n)
{
    size_t high = 0;
    for (size_t q = 0; q < queries; q += high) {
        high = queries - q >= QUERY_TILE ? QUERY_TILE : 1;
        size_t c = 0;
        for (; c + COLUMNS * W <= n; c += COLUMNS * W) {
            if (high == QUERY_TILE) {
                weigh_fixed(y + q, a + q, QUERY_TILE, x, m, n, c, COLUMNS);
            } else {
                weigh_fixed(y + q, a + q, 1, x, m, n, c, COLUMNS);
            }
        }
        for (size_t i = 0; i < high; i++) {
            size_t rest = c;
            for (; rest + W <= n; rest += W) {
                weigh_fixed(y + q + i, a + q + i, 1, x, m, n, rest, 1);
            }
            weigh_ref(y[q + i] + rest, a[q + i], x + rest, m, n - rest, n);
        }
    }
}

#ifndef NO_MAIN // the tests include this file and bring their own
int main(int argc, char **argv)
{
    Options o = parse_options(argc, argv);
    bool tokens_only = !strcmp(o.mode, "tokenize");
    bool need_model = !tokens_only || o.model || !o.tokenizer;
    if (need_model && !o.model) {
        o.model = DEFAULT_MODEL;
    }
    Model m = {0};
    if (need_model) {
        m = open_model(o.model);
        if (o.context > m.h.max_seq_len) {
            die(USAGE, "-c: expected at most %u, the context of %s, found %zu", m.h.max_seq_len, m.path, o.context);
        }
    }
    char *path = tokenizer_path(&o);
    Tokenizer t = open_tokenizer(path);
    if (need_model) {
        check_pair(&m, &t);
    }
    if (tokens_only) {
        tokenize(&t, &o);
    } else {
        generate(&m, &t, &o);
    }
    finish_output();
    free(m.layers);
    free(t.pieces);
    free(t.table);
    free(path);
    return 0;
}
#endif
