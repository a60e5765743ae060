/* run.c: a large language model is two files: the weights, and this program, which runs them.
 *
 * A language model continues a text. The text is cut into tokens: words, or parts of words, from a fixed list, the
 * vocabulary. The place of a token in the list is its id. From the tokens so far, the model computes one score for each
 * token of the vocabulary: how well it would fit as the next one. These scores are called logits. They are computed
 * with billions of fixed numbers, the weights, also called parameters. The weights were found beforehand, by training:
 * they were adjusted, little by little, until, in a very large amount of text, the token that really came next usually
 * had a high score. The program chooses the next token with the help of the logits, appends it to the text, and
 * repeats. Stories, answers and programs are all written in this way, token by token. The model itself works with ids
 * only. A third, small file, the tokenizer file, contains the vocabulary. With it, a text is turned into ids and back.
 *
 * The program runs every model of the Llama family. Section 2 describes the form of these models. export.py converts
 * such a model to a weights file, in which each parameter takes 2 bytes. The program does not train models. It needs
 * libc and libm, and it uses OpenMP, if the compiler has it, to run on all cores.
 *
 *    1 The model file       what it contains, and how it is mapped into memory
 *    2 The Transformer      from token ids to logits
 *    3 Sampling             from logits to the next token
 *    4 Generation           the loop that writes a text
 *    5 The tokenizer        from text to token ids and back
 *    6 Chat                 conversations
 *    7 Output, other modes  what may come next, how well a text is predicted, how fast the machine is
 *    8 The command line
 *    9 Plumbing             errors, memory, files, number formats, the process
 *   10 Fast kernels         the loops of section 2 for AVX-512, AMX, AVX2 and NEON
 *   11 Larger than memory   how to use a weights file that does not fit in memory
 *   12 Several machines     how machines share a model, with MPI
 *
 * Sections 1 to 4 are the language model, written as plain loops. Two functions take nearly all of the time: the matrix
 * product and attention, which section 2 explains and shows as plain loops, matmul_ref and attention_ref. Section 10
 * has a fast version of each, called a kernel. It computes the same sums with the vector instructions of the CPU, in
 * another order, so the last bits may differ. `make plain` builds a program from the plain loops alone. Everything else
 * that sections 1 to 4 call is explained where it is declared.
 *
 * Several tokens can pass through the model together, as a batch. The context is the text so far, as far as the model
 * can look back. Logits are the same bit for bit, however a text is split into batches and however many threads run:
 * each sum is computed by one thread, in an order that depends on neither. Section 4 relies on this.
 *
 * Comments give the shape of an array as (rows, columns), stored row after row, with letters that sections 1 and 2
 * explain:
 *
 *   T tokens in this batch             D dim            H n_heads       d head_dim    Q = H*d
 *   C most tokens that a context has   F hidden_dim     G n_kv_heads    V vocab_size  K = G*d
 */
#define _GNU_SOURCE // for sched_getaffinity
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// How numbers are stored: in 32 bits, or in one of two 16-bit formats. BF16 is the upper 16 bits of an F32; F16 has
// more digits and a smaller range. BF16_AMX is BF16 in the order in which AMX instructions read it, see section 10.
typedef enum { F32, BF16, F16, BF16_AMX } Dtype;

// ---- Helpers that all sections use. Section 9 defines them.

// Exit status: a bad file or not enough memory; a bad flag; Ctrl-C.
enum { EXIT_ERROR = 1, EXIT_USAGE = 2, EXIT_INTERRUPTED = 130 };
// Prints one line on standard error and exits.
__attribute__((format(printf, 2, 3))) static _Noreturn void die(int status, const char *format, ...);
#define expect(condition, ...) ((condition) ? (void)0 : die(EXIT_ERROR, __VA_ARGS__))
static void *allocate(size_t count, size_t size, const char *what); // uninitialised memory
static size_t min(size_t a, size_t b) { return a < b ? a : b; }
static size_t max(size_t a, size_t b) { return a > b ? a : b; }
static size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }
static void convert_f32(void *out, Dtype dtype, const float *values, size_t n); // n f32 to an array of `dtype`
static float exp_f32(float x); // e^x to 3 units in the last place; unlike expf, compilers can make vector code of it
static double seconds(void);   // a clock, to measure times

// An array that grows. data[0] to data[n - 1] are in use.
#define ARRAY(type)                                                                                                    \
    struct {                                                                                                           \
        type *data;                                                                                                    \
        size_t n, capacity;                                                                                            \
    }
static void *grow(void *data, size_t *capacity, size_t n, size_t size);
// reserve makes room for `more` elements behind the last one. push appends one element.
#define reserve(array, more)                                                                                           \
    ((array)->data = grow((array)->data, &(array)->capacity, (array)->n + (more), sizeof *(array)->data))
#define push(array, value) (reserve(array, 1), (array)->data[(array)->n++] = (value))
typedef ARRAY(uint32_t) Tokens; // token ids

// A text, or a part of one.
typedef struct {
    const unsigned char *bytes;
    size_t n;
} Span;

// ------------------------------------------------------------------------------------------------
// 1 The model file
//
// A header of 4,096 bytes, then the weights, in the order in which the Transformer uses them. The file is mapped into
// memory instead of being read: the system loads a part of it when the program first touches that part. So the program
// starts at once, needs no second copy of the weights, and several programs can share them.
//
// The fields below are listed here and explained in section 2. Skim them at a first reading.

enum { TIED = 1, QKV_BIAS = 2, QK_NORM = 4, ALL_FLAGS = 7 }; // Header.flags
enum { ROPE_PLAIN, ROPE_LINEAR, ROPE_LLAMA3 };               // Header.rope_scaling
// Bytes before the weights; each tensor starts at a multiple of ALIGNMENT bytes, a cache line.
enum { HEADER_SPACE = 4096, ALIGNMENT = 64, MAX_HEAD_DIM = 1024 };

// The start of a weights file, byte for byte.
typedef struct {
    char magic[8];               // "twofiles"
    uint32_t version;            // the version of the file format: 1
    uint32_t dtype;              // the type of all weights: BF16 or F16
    uint32_t flags;              // TIED: the embedding is also the classifier. QKV_BIAS, QK_NORM: see Layer
    uint32_t dim;                // D: the length of the vector that represents a token
    uint32_t hidden_dim;         // F: the length of the vector inside the feed-forward block
    uint32_t n_layers;           // the number of layers
    uint32_t n_heads;            // H: the number of query heads
    uint32_t n_kv_heads;         // G: the number of key and value heads
    uint32_t head_dim;           // d: the length of the vectors of one head
    uint32_t vocab_size;         // V: the number of different tokens
    uint32_t max_seq_len;        // the longest text that the model was trained for, in tokens
    float norm_eps;              // a small number that keeps RMSNorm from dividing by 0
    float rope_theta;            // the base of RoPE's frequencies; rope_frequency explains this and the next five
    uint32_t rope_scaling;       // how RoPE was adapted to texts longer than those of the first training
    float rope_factor;           // ROPE_LINEAR, ROPE_LLAMA3: the factor by which frequencies are divided
    float rope_low_freq_factor;  // ROPE_LLAMA3: pairs of numbers that make fewer turns are slowed down
    float rope_high_freq_factor; // ROPE_LLAMA3: pairs of numbers that make more turns are kept
    uint32_t rope_original_max_seq_len; // ROPE_LLAMA3: the longest text of the first training, in tokens
    uint64_t file_size;                 // the size of the file, in bytes
    uint64_t vocab_hash;                // a hash of the vocabulary: a tokenizer file with another one is refused
} Header;

// A matrix, or a vector (rows = 1).
typedef struct {
    void *data;
    Dtype dtype;
    size_t rows, cols;
    size_t stride; // the distance from one row to the next, in elements: cols, or more in a part of a matrix
} Tensor;

// The weights of one layer. A matrix with 5 rows and 3 columns makes 5 numbers from 3: matrices are (outputs, inputs).
typedef struct {
    Tensor attn_norm; // (D)           weights of the RMSNorm before attention
    Tensor wqkv;      // (Q + 2K, D)   makes queries (Q numbers), keys (K) and values (K)
    Tensor bqkv;      // (Q + 2K)      is added to them; has 0 columns without the flag QKV_BIAS
    Tensor q_norm;    // (d)           weights of the RMSNorm of each query; 0 columns without QK_NORM
    Tensor k_norm;    // (d)           weights of the RMSNorm of each key; 0 columns without QK_NORM
    Tensor wo;        // (D, Q)        combines the outputs of the heads
    Tensor ffn_norm;  // (D)           weights of the RMSNorm before the feed-forward block
    Tensor w_gate_up; // (2F, D)       makes two vectors of F numbers, "gate" and "up"
    Tensor w_down;    // (D, F)        makes the D numbers that the feed-forward block adds
} Layer;

// A file in memory.
typedef struct {
    const char *path;
    unsigned char *bytes; // (size)
    size_t size;
    int fd;
} File;

typedef struct {
    File file;
    Header h;
    size_t q_dim, kv_dim; // Q and K
    Tensor embedding;     // (V, D)  the vector of each token
    Layer *layers;        // (n_layers)
    Tensor final_norm;    // (D)
    Tensor classifier;    // (V, D)  makes the logits
    size_t end;           // the offset in the file where the last tensor found so far ends
} Model;

// map_file maps a file that starts with `magic`. check_header refuses impossible values. Section 9.
static File map_file(const char *path, const char *magic, size_t min_size, const char *what);
static void check_header(const Model *m);

// Returns the next tensor of the file.
static Tensor next_tensor(Model *m, size_t rows, size_t cols) {
    size_t start = round_up(m->end, ALIGNMENT);
    m->end = start + rows * cols * sizeof(uint16_t);
    return (Tensor){m->file.bytes + start, (Dtype)m->h.dtype, rows, cols, cols};
}

static Model open_model(const char *path) {
    Model m = {.file = map_file(path, "twofiles", HEADER_SPACE, "a weights file"), .end = HEADER_SPACE};
    memcpy(&m.h, m.file.bytes, sizeof m.h); // a copy: another program may change the file after the check
    check_header(&m);
    size_t D = m.h.dim, F = m.h.hidden_dim, V = m.h.vocab_size, d = m.h.head_dim;
    size_t Q = m.q_dim = m.h.n_heads * d;
    size_t K = m.kv_dim = m.h.n_kv_heads * d;
    size_t bias_cols = m.h.flags & QKV_BIAS ? Q + 2 * K : 0; // 0 columns: the model has no such tensor
    size_t norm_cols = m.h.flags & QK_NORM ? d : 0;

    m.embedding = next_tensor(&m, V, D);
    m.layers = allocate(m.h.n_layers, sizeof *m.layers, "the table of layers");
    for (Layer *l = m.layers; l < m.layers + m.h.n_layers; l++) {
        l->attn_norm = next_tensor(&m, 1, D);
        l->wqkv = next_tensor(&m, Q + 2 * K, D);
        l->bqkv = next_tensor(&m, 1, bias_cols);
        l->q_norm = next_tensor(&m, 1, norm_cols);
        l->k_norm = next_tensor(&m, 1, norm_cols);
        l->wo = next_tensor(&m, D, Q);
        l->ffn_norm = next_tensor(&m, 1, D);
        l->w_gate_up = next_tensor(&m, 2 * F, D);
        l->w_down = next_tensor(&m, D, F);
    }
    m.final_norm = next_tensor(&m, 1, D);
    m.classifier = m.h.flags & TIED ? m.embedding : next_tensor(&m, V, D);
    expect(m.end == m.file.size, "%s: file size: expected %zu bytes by its header, found %zu: incomplete or damaged",
           path, m.end, m.file.size);
    return m;
}

// ------------------------------------------------------------------------------------------------
// 2 The Transformer
//
// The Transformer is the function that computes logits from token ids. Each token is represented by a vector x of D
// numbers, at first its row of the embedding matrix. The vectors pass through n_layers layers of the same form, each
// with its own weights. A layer has two blocks. Each of them takes a copy of x, scaled to a standard magnitude
// (RMSNorm), computes a vector from this copy, and adds it to x. What earlier blocks have added stays part of the sum,
// so later blocks can use it, and each block only has to add a correction (a "residual"). Therefore x, which passes
// through all blocks, is called the residual stream.
//
//   Attention collects information from earlier tokens. For each token, a weight matrix makes from the copy a query
//   (what the token looks for), a key (what it can be found by) and a value (what it passes on), three vectors of d
//   numbers. The dot product of a query with the key of a token is an attention score: it says how well the two match.
//   Softmax turns attention scores into attention weights, which add up to 1, and the result is the sum of the values,
//   each multiplied by its weight. A token looks at itself and at earlier tokens, never at later ones. In training, a
//   whole text passes through the model at once, and the vector of each token has to predict the next token. If it
//   could look at that token, the model would only learn to copy it.
//
//   H heads do all this side by side. Each head uses other rows of the weight matrix, so each looks for something else.
//   The results of all heads stand side by side, Q = H*d numbers, and a second matrix makes from these the D numbers
//   that are added to x. In many models, each head has its own queries, but shares its keys and values with other
//   heads, so that fewer keys and values have to be kept and read. Models lose little by it. This is called
//   grouped-query attention: there are H query heads and only G heads of keys and values, called kv heads, each for H/G
//   query heads.
//
//   The feed-forward block works on the vector of each token alone. A matrix makes two vectors of F numbers from the
//   copy, a non-linear function (SwiGLU) makes one vector of F numbers from the two, and a second matrix makes the D
//   numbers that are added to x. If that function were linear, a single matrix could do the work of both. Most of the
//   weights are in these blocks, and much of what a model knows.
//
// After the last layer and one more RMSNorm, a matrix called the classifier turns the vector of a token into logits. It
// has a row for each token of the vocabulary, as the embedding has. Some models use the embedding for both (TIED).
// Below, the logits of a token are those that are computed from its vector: they score the token that follows it.
//
// The keys and values of a token depend on this token and earlier ones only, so they never change. They are kept in the
// KV cache. Thanks to it, only the new token has to pass through the layers at each step, not the whole text again. A
// query serves its own token only and is not kept.
//
// The prompt is the text that the model is given to continue. To read it is called prefill: its tokens are all known,
// so they pass through the layers together, as a batch. In each layer, first the keys and values of all of them are
// computed, then each token looks at the earlier ones. Each weight that is loaded from memory serves all tokens of the
// batch. Prefill is limited by how fast the CPU multiplies. Generation is called decode: each token depends on the one
// before, so T = 1 (or a few, with the guesses of section 4). Each pass needs all weights, and the limit is how fast
// memory delivers them. The longer the text, the more keys and values each token has to read as well.
//
// Several threads share the work. All of them call forward, and so the functions that forward calls directly, at the
// same time. There, `omp for` gives each thread a share of the loop that follows, and the threads wait for each other
// at its end. The other functions of this section are called inside such a loop, by one thread for its share. Without
// OpenMP, `omp for` has no effect. matmul_ref and attention_ref are an exception: only the plain program runs them, and
// it has one thread. Sections 3 and 4 run on one thread.

typedef struct Paging Paging; // section 11

// The memory of a running model: the KV cache, and the numbers that are computed for one batch of tokens.
typedef struct {
    size_t threads;     // the number of threads
    bool adapt_threads; // -j was not given: fewer threads may run, if that is faster
    struct Team *team;  // measured times, by which the number of threads is chosen, see section 10
    size_t context;     // C: the number of positions in the KV cache
    size_t batch;    // the largest T, a limit for the memory of the arrays below: longer prompts take several batches
    uint16_t *k, *v; // the KV cache: layers*G*C*d numbers of keys, and as many of values; section 10 chooses the order
    Dtype kv_type;   // the type of these numbers: F16 or BF16
    float *x;        // (T, D)       the residual stream
    float *qkv;      // (T, Q + 2K)  queries, keys and values of one layer
    float *gate_up;  // (T, 2F)      inside the feed-forward block; uses the memory of qkv, which is free by then
    void *xb;        // (T, cols)    the input of the next matrix product, in the form that the product reads fastest
    Dtype xb_type;   // the type of these numbers
    float *logits;   // (n, V)       of the last n tokens of a batch
    float *rope_cos; // (T, d/2)     RoPE's rotations for the positions of the batch
    float *rope_sin; // (T, d/2)
    float *scratch;  // (threads, scratch_size)  a buffer for each thread, see thread_scratch
    size_t scratch_size;
    Paging *paging; // section 11's record of a large weights file; NULL for a small one
} RunState;

// ---- Access to numbers whose order in memory section 10 chooses

// cache_kv writes the key and the value (d numbers each) of kv head g at position pos into the KV cache, as 16-bit
// numbers. cached_k and cached_v read number i of them.
static void cache_kv(const Model *m, RunState *s, size_t layer, size_t g, size_t pos, const float *k, const float *v);
static float cached_k(const Model *m, const RunState *s, size_t layer, size_t g, size_t pos, size_t i);
static float cached_v(const Model *m, const RunState *s, size_t layer, size_t g, size_t pos, size_t i);
// xb_view returns s->xb as a matrix (T, cols).
static Tensor xb_view(const RunState *s, size_t T, size_t cols);
// element reads element (r, c) of a matrix. store_row writes n values into its row r, from column c on. c has to be
// even, because AMX stores numbers in pairs.
static float element(Tensor a, size_t r, size_t c);
static void store_row(Tensor a, size_t r, size_t c, const float *values, size_t n);
// thread_scratch returns the buffer of the calling thread. It has room for max(D, Q, F, C) numbers.
static float *thread_scratch(const RunState *s);

// ---- The matrix product

typedef enum { SET, ADD } Update; // out = ..., or out += ...

// Returns the dot product of row r of w and row t of x.
static float dot_ref(Tensor w, size_t r, Tensor x, size_t t) {
    float sum = 0;
    for (size_t c = 0; c < w.cols; c++)
        sum += element(w, r, c) * element(x, t, c);
    return sum;
}

// Multiplies each token's row of x (T, cols) by the matrix w (rows, cols). SET stores w[r] . x[t] in out[t][r], and ADD
// adds it to what is there. This takes most of the time.
static void matmul_ref(float *out, Tensor w, Tensor x, Update update) {
    for (size_t t = 0; t < x.rows; t++)
        for (size_t r = 0; r < w.rows; r++) {
            float dot = dot_ref(w, r, x, t);
            if (update == ADD)
                dot += out[t * w.rows + r];
            out[t * w.rows + r] = dot;
        }
}

// matmul_update, in section 10, is the fast version, shared by all threads. In the plain program it calls matmul_ref.
static void matmul_update(RunState *s, float *out, Tensor w, Tensor x, Update update);
// out (T, rows) = the product of x and w transposed; matmul_add adds it to out.
static void matmul(RunState *s, float *out, Tensor w, Tensor x) { matmul_update(s, out, w, x, SET); }
static void matmul_add(RunState *s, float *out, Tensor w, Tensor x) { matmul_update(s, out, w, x, ADD); }

// ---- The steps of a layer

// RMSNorm (root mean square). The numbers in x get larger as blocks add to them, more for some tokens than for others.
// RMSNorm brings them back to the magnitude that the next weights were trained for. A weight for each number sets how
// much this number counts: out = x / sqrt(mean(x^2) + eps) * weight.                         (Zhang and Sennrich 2019)
static void rmsnorm_row(float *out, const float *x, Tensor weight, float eps) {
    size_t n = weight.cols;
    // The sum of squares. Compilers may not change the order of additions, so they cannot make vector code of a single
    // sum. They can make it of 16 independent sums, which are added up afterwards. The last n % 16 squares follow.
    float sums[16] = {0}, squares = 0;
    for (size_t i = 0; i + 16 <= n; i += 16)
        for (size_t j = 0; j < 16; j++)
            sums[j] += x[i + j] * x[i + j];
    for (size_t j = 0; j < 16; j++)
        squares += sums[j];
    for (size_t i = n / 16 * 16; i < n; i++)
        squares += x[i] * x[i];
    float scale = 1.0f / sqrtf(squares / (float)n + eps);
    for (size_t i = 0; i < n; i++)
        out[i] = x[i] * scale * element(weight, 0, i);
}

// out (T, D) = RMSNorm of each row of x (T, D)
static void rmsnorm(RunState *s, Tensor out, const float *x, Tensor weight, float eps) {
#pragma omp for
    for (size_t t = 0; t < out.rows; t++) {
        float *row = thread_scratch(s);
        rmsnorm_row(row, x + t * out.cols, weight, eps);
        store_row(out, t, 0, row, out.cols);
    }
}

// x (T, D) = the tokens' rows of the embedding
static void embed(float *x, Tensor embedding, const uint32_t *tokens, size_t T) {
#pragma omp for
    for (size_t t = 0; t < T; t++)
        for (size_t i = 0; i < embedding.cols; i++)
            x[t * embedding.cols + i] = element(embedding, tokens[t], i);
}

// RoPE (rotary position embedding) tells attention where a token stands, since attention as such does not know the
// order of the tokens. The numbers of each query and key are taken in pairs (i, i + d/2), and each pair is rotated by
// an angle proportional to the position of the token. Rotating a query and a key by the same angle does not change
// their dot product. So only the difference of their two angles counts, and that is proportional to how far apart their
// tokens are, wherever in the text.                                                                 (Su et al. 2021)
static void rope(float *x, const float *rope_cos, const float *rope_sin, size_t half) {
    for (size_t i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * rope_cos[i] - b * rope_sin[i];
        x[i + half] = b * rope_cos[i] + a * rope_sin[i];
    }
}

// Returns the frequency of pair i: the angle, in radians, by which it turns per position. It is theta^(-2i/d): the
// first pairs turn fast and tell neighbours apart; the last ones turn slowly and tell near from far. Some models were
// trained on short texts first and then adapted to longer ones by slower rotations, so that a far position gets an
// angle that a nearer one had in the first training. ROPE_LINEAR divides all frequencies by rope_factor. ROPE_LLAMA3
// asks how many turns a pair makes within rope_original_max_seq_len tokens. If these are more than
// rope_high_freq_factor, the pair keeps its frequency, since no angle is new to it. If they are fewer than
// rope_low_freq_factor, the frequency is divided by rope_factor. Between the two, it is interpolated.
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

// Computes the rotations of T positions from pos on. They are the same in every layer and head.
static void rope_cos_sin(RunState *s, const Header *h, size_t pos, size_t T) {
    size_t half = h->head_dim / 2;
#pragma omp for
    for (size_t i = 0; i < half; i++) {
        float freq = rope_frequency(h, i);
        for (size_t t = 0; t < T; t++) {
            float angle = (float)(pos + t) * freq;
            s->rope_cos[t * half + i] = cosf(angle);
            s->rope_sin[t * half + i] = sinf(angle);
        }
    }
}

// Adds the biases to queries, keys and values (only with QKV_BIAS), normalises queries and keys so that no attention
// score gets very large (only with QK_NORM), applies RoPE to queries and keys, and writes keys and values into the KV
// cache.
static void rope_and_cache_kv(const Model *m, RunState *s, size_t layer, size_t pos, size_t T) {
    const Layer *l = &m->layers[layer];
    size_t d = m->h.head_dim, H = m->h.n_heads, G = m->h.n_kv_heads;
#pragma omp for
    for (size_t t = 0; t < T; t++) {
        float *q = s->qkv + t * (H + 2 * G) * d;
        float *k = q + H * d;
        float *v = k + G * d;
        for (size_t i = 0; i < l->bqkv.cols; i++) // adds the biases of q, k and v, which are adjacent
            q[i] += element(l->bqkv, 0, i);
        for (size_t head = 0; head < H + G; head++) { // the query heads, then the key heads
            float *vector = q + head * d;
            if (m->h.flags & QK_NORM)
                rmsnorm_row(vector, vector, head < H ? l->q_norm : l->k_norm, m->h.norm_eps);
            rope(vector, s->rope_cos + t * d / 2, s->rope_sin + t * d / 2, d / 2);
        }
        for (size_t g = 0; g < G; g++)
            cache_kv(m, s, layer, g, pos + t, k + g * d, v + g * d);
    }
}

// Softmax turns scores into weights, or probabilities, which are positive and add up to 1. Scores may be negative, so
// it takes e^x of each, which is positive, and divides by the sum of these. A score that is larger by 1 gets e times
// the weight. Subtracting the maximum first keeps e^x from overflowing. It changes nothing in the result, because a
// factor common to all e^x cancels out.
static void softmax(float *x, size_t n) {
    float largest = -INFINITY;
    for (size_t i = 0; i < n; i++)
        largest = x[i] > largest ? x[i] : largest;
    for (size_t i = 0; i < n; i++)
        x[i] = exp_f32(x[i] - largest);
    double sum = 0; // in double: there may be 100,000 small numbers
    for (size_t i = 0; i < n; i++)
        sum += (double)x[i];
    for (size_t i = 0; i < n; i++)
        x[i] = (float)((double)x[i] / sum);
}

// Attention: out (T, Q). For each token and query head it computes the scores q . k / sqrt(d) of all positions up to
// the token's own, turns them into attention weights, and adds up the values v with these weights.
//                                                                                                 (Vaswani et al. 2017)
static void attention_ref(const Model *m, RunState *s, Tensor out, size_t layer, size_t pos) {
    size_t d = m->h.head_dim, H = m->h.n_heads, G = m->h.n_kv_heads;
    float result[MAX_HEAD_DIM];      // (d)
    float *attn = thread_scratch(s); // (n)  attention scores, which softmax turns into attention weights
    for (size_t t = 0; t < out.rows; t++)
        for (size_t head = 0; head < H; head++) {
            const float *q = s->qkv + (t * (H + 2 * G) + head) * d;
            size_t g = head / (H / G); // the kv head that H/G query heads share
            size_t n = pos + t + 1;    // the positions that this token may look at

            // scores: how well does the key of each position match the query? The d products of a score partly cancel
            // out, as their signs differ, so that their sum typically grows with sqrt(d). Undivided, large scores
            // would make softmax give nearly all the weight to one position.
            for (size_t j = 0; j < n; j++) {
                float score = 0;
                for (size_t i = 0; i < d; i++)
                    score += q[i] * cached_k(m, s, layer, g, j, i);
                attn[j] = score / sqrtf((float)d);
            }
            softmax(attn, n);

            // the weighted sum of the values
            for (size_t i = 0; i < d; i++) {
                float sum = 0;
                for (size_t j = 0; j < n; j++)
                    sum += attn[j] * cached_v(m, s, layer, g, j, i);
                result[i] = sum;
            }
            store_row(out, t, head * d, result, d);
        }
}

// attention, in section 10, is the fast version, shared by all threads. In the plain program it calls attention_ref.
static void attention(const Model *m, RunState *s, Tensor out, size_t layer, size_t pos);

// SwiGLU (Swish-gated linear unit), the non-linear function of the feed-forward block: out (T, F) = silu(gate) * up.
// Each number of "up" is multiplied by silu of its gate. silu(x) = x / (1 + e^-x) is almost 0 if x is far below 0,
// which blocks the number, and almost x if x is far above. Models learn more with it than with a function of one
// vector.
//                                                                                                        (Shazeer 2020)
static void swiglu(RunState *s, Tensor out, const float *gate_up) {
    size_t F = out.cols;
#pragma omp for
    for (size_t t = 0; t < out.rows; t++) {
        const float *gate = gate_up + t * 2 * F, *up = gate + F;
        float *row = thread_scratch(s);
        for (size_t i = 0; i < F; i++)
            row[i] = gate[i] / (1.0f + exp_f32(-gate[i])) * up[i];
        store_row(out, t, 0, row, F);
    }
}

// Computes the logits (n, V) of n tokens of the batch, from token t on.
static void compute_logits(const Model *m, RunState *s, size_t t, size_t n) {
    Tensor normed = xb_view(s, n, m->h.dim);
    rmsnorm(s, normed, s->x + t * m->h.dim, m->final_norm, m->h.norm_eps);
    matmul(s, s->logits, m->classifier, normed);
}

// The Transformer: takes T tokens at the positions pos, pos + 1, ..., adds their keys and values to the KV cache, and
// leaves the logits of the last n_logits of them in s->logits. n_logits is 0 for all batches of a prompt but the last
// one, because the tokens that follow are known. It is 1 for the last batch, and 1 + n for a batch that ends with n
// guesses (section 4).
static void forward(const Model *m, RunState *s, const uint32_t *tokens, size_t T, size_t pos, size_t n_logits) {
    // The inputs of the matrix products. Only one is in use at a time, so all three are views of s->xb.
    Tensor normed = xb_view(s, T, m->h.dim);
    Tensor heads = xb_view(s, T, m->q_dim);
    Tensor hidden = xb_view(s, T, m->h.hidden_dim);

    embed(s->x, m->embedding, tokens, T);
    rope_cos_sin(s, &m->h, pos, T);
    for (size_t i = 0; i < m->h.n_layers; i++) {
        const Layer *l = &m->layers[i];

        // attention block: keys and values of the whole batch are cached before any token looks at them
        rmsnorm(s, normed, s->x, l->attn_norm, m->h.norm_eps);
        matmul(s, s->qkv, l->wqkv, normed);
        rope_and_cache_kv(m, s, i, pos, T);
        attention(m, s, heads, i, pos);
        matmul_add(s, s->x, l->wo, heads); // adds the result to the residual stream

        // feed-forward block
        rmsnorm(s, normed, s->x, l->ffn_norm, m->h.norm_eps);
        matmul(s, s->gate_up, l->w_gate_up, normed);
        swiglu(s, hidden, s->gate_up);
        matmul_add(s, s->x, l->w_down, hidden);
    }
    if (n_logits)
        compute_logits(m, s, T - n_logits, n_logits);
}

// Runs forward on all threads, and exits if a logit is not a finite number. Section 10.
static void forward_parallel(const Model *m, RunState *s, const uint32_t *tokens, size_t T, size_t pos,
                             size_t n_logits);

// ------------------------------------------------------------------------------------------------
// 3 Sampling
//
// Always choosing the most likely token gives dull texts that repeat themselves. So the next token is drawn at random:
// softmax turns the logits into probabilities. An unlikely token is rarely drawn, but there are so many of them that
// together they would spoil the text. Three settings prevent this:
//
//   temperature   the logits are divided by it: below 1, likely tokens get more likely; at 0, the most likely is taken
//   top-k         then only the k most likely tokens can be drawn                                  (Fan et al. 2018)
//   top-p         of the tokens that top-k leaves, keeps the fewest, the most likely first, whose probabilities add up
//                 to at least p times the sum of all that top-k leaves; also called nucleus sampling
//                                                                                             (Holtzman et al. 2020)

// An entry of a heap: an array from which the entry with the largest key is removed quickly. Section 9.
typedef struct {
    float key;
    uint32_t index;          // of two entries with equal keys, the one with the smaller index comes first
    uint32_t merged, length; // used by the tokenizer only
} HeapEntry;
typedef ARRAY(HeapEntry) Heap;
static void heap_push(Heap *heap, HeapEntry entry);
static HeapEntry heap_pop(Heap *heap);

typedef struct {
    float temperature;
    float top_p;          // 0 or 1: off
    size_t top_k;         // 0: off
    uint64_t random;      // the state of the random number generator; starts as the seed
    float *probabilities; // (V)
    Heap heap;            // of tokens, by their probabilities
    Tokens candidates;    // the tokens that can be drawn
} Sampler;

// Returns a random number in [0, 1), by the generator splitmix64.                      (Steele, Lea and Flood 2014)
static double random_f64(uint64_t *state) {
    *state += 0x9e3779b97f4a7c15;
    uint64_t z = *state;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return (double)((z ^ z >> 31) >> 11) * 0x1p-53;
}

// Returns the index of the largest value.
static uint32_t argmax(const float *values, size_t n) {
    size_t best = 0;
    for (size_t i = 1; i < n; i++)
        if (values[i] > values[best])
            best = i;
    return (uint32_t)best;
}

// Fills the empty list of candidates, the most likely token first: the top_k most likely tokens (all, if top_k is 0).
// Of this list it keeps the shortest beginning whose probabilities reach top_p times the sum of all in the list.
// Returns the sum of the probabilities of the candidates.
static double top_k_top_p(Sampler *s, size_t n) {
    const float *p = s->probabilities;
    size_t k = s->top_k ? s->top_k : n;
    double top_p = s->top_p > 0 ? (double)s->top_p : 1;
    double enough = s->top_k ? 1 : top_p; // the list is complete at this sum; with top-k, top-p shortens it afterwards

    // A heap gives the most likely tokens without sorting all. Unlikely tokens do not need to enter it: at most n
    // tokens are below `least` = (1 - enough) / n, so they have less than 1 - enough together. All probabilities add up
    // to 1, so the others reach `enough` alone. With top-k, least is 0, and all tokens enter it.
    double least = (1 - enough) / (double)n;
    s->heap.n = 0;
    for (size_t i = 0; i < n; i++)
        if ((double)p[i] >= least)
            heap_push(&s->heap, (HeapEntry){.key = p[i], .index = (uint32_t)i});

    double sum = 0;
    while (s->candidates.n < k && s->heap.n > 0 && sum < enough) {
        uint32_t token = heap_pop(&s->heap).index;
        push(&s->candidates, token);
        sum += (double)p[token];
    }
    if (s->top_k == 0)
        return sum;

    // top-p after top-k: the shortest beginning of the list that has top_p times its sum
    double kept = 0;
    size_t count = 0;
    while (count < s->candidates.n && kept < top_p * sum)
        kept += (double)p[s->candidates.data[count++]];
    s->candidates.n = count;
    return kept;
}

// Chooses the next token, given the logits (n).
static uint32_t sample(Sampler *s, const float *logits, size_t n) {
    uint32_t best = argmax(logits, n);
    if (s->temperature == 0)
        return best;
    float *p = s->probabilities;
    for (size_t i = 0; i < n; i++) // minus the largest: if the division overflows, then to -infinity: probability 0
        p[i] = (logits[i] - logits[best]) / s->temperature;
    softmax(p, n);

    // collect the tokens that can be drawn
    double sum = 1;
    s->candidates.n = 0;
    if (s->top_k || (s->top_p > 0 && s->top_p < 1))
        sum = top_k_top_p(s, n);
    else
        for (uint32_t i = 0; i < n; i++)
            push(&s->candidates, i);

    // draw one: the probabilities lie end to end from 0 to sum, and the candidate where a random number falls is chosen
    double coin = sum * random_f64(&s->random);
    for (size_t i = 0; i < s->candidates.n; i++) {
        coin -= (double)p[s->candidates.data[i]];
        if (coin < 0)
            return s->candidates.data[i];
    }
    return best; // only rounding leads here
}

// ------------------------------------------------------------------------------------------------
// 4 Generation
//
// A text grows token by token. First, all tokens of the prompt pass through the Transformer (prefill). Then, one token
// is chosen, appended, and passed through the Transformer alone (decode), again and again.

typedef struct Options Options;     // the command line, section 8
typedef struct Tokenizer Tokenizer; // section 5
typedef struct Chat Chat;           // the turns of a conversation, section 6
typedef struct Printer Printer;     // the state of standard output, section 6

// The text that the model has read and written.
typedef struct {
    Tokens tokens;
    size_t n_past;     // the KV cache holds the keys and values of the first n_past tokens
    size_t max_tokens; // the most tokens that it can hold: the length of the KV cache, C
} Context;

// What the statistics at the end are computed from.
typedef struct {
    size_t n_prompt, n_generated;     // tokens that were read, and tokens that were generated
    size_t n_decoded;                 // decode steps: one for each token but the first of a reply, see generate_reply
    size_t n_accepted;                // decode steps that needed no pass, because the token had been guessed
    double prefill_time, decode_time; // in seconds
} Stats;

typedef struct {
    const Options *options;
    Model model;
    RunState run;
    Sampler sampler;
    Context context;
    Stats stats;
    Tokenizer *tokenizer;
    Printer *printer;
    Chat *chat; // NULL unless in a chat
} Session;

static bool interrupted(void); // has Ctrl-C been pressed in a chat? Elsewhere, Ctrl-C ends the program. Section 6
static void encode(Tokenizer *t, Tokens *tokens, Span text); // appends the tokens of a text; section 5
static bool is_stop(const Tokenizer *t, uint32_t token);     // is it a stop token, which ends a text? section 5
static Span read_prompt(Session *s);                         // the text of the flags -i or -f
static size_t start_generation(Session *s); // allocates memory; returns the most tokens to generate, 0: no limit
static void print_prompt(Session *s);
// prints nothing for a stop token; the logits are for --probs and --json, which show probabilities
static void print_token(Session *s, uint32_t token, const float *logits);
static void end_reply(Session *s); // ends the line
static void print_stats(const Session *s);
// make_room returns true if the last token has a place in the KV cache. In a chat, it first makes one if necessary: it
// forgets the oldest turns. Then the tokens after these have other positions, n_past is smaller, and evaluate computes
// their keys and values again.
static bool make_room(Session *s);
// draft guesses the next tokens: it takes the last few tokens of the text, looks for an earlier place where the same
// ones stand, and copies what follows there to tokens.data[n], [n + 1], ..., without counting them in n. It returns how
// many: never more than fit in a batch and in the context, and 0 without --draft. It also returns 0 if make_room has
// just forgotten turns, because evaluate needs the last token and all guesses in one batch. Section 10.
static size_t draft(Session *s);

// Runs the Transformer on the tokens that are not in the KV cache yet, batch by batch. n_draft guesses follow the last
// token in the same batch. Then row 0 of the logits scores what follows the last token, and row i what follows the i-th
// guess. Guesses do not count in n_past. No token looks at the keys and values of a wrong guess: the next batch
// overwrites the positions from n_past on before attention, and no token looks beyond its own position. Ctrl-C ends
// this early.
static void evaluate(Session *s, size_t n_draft) {
    Context *c = &s->context;
    while (c->n_past < c->tokens.n && !interrupted()) {
        size_t T = min(s->run.batch, c->tokens.n + n_draft - c->n_past);
        size_t n_logits = c->n_past + T < c->tokens.n ? 0 : 1 + n_draft; // of the last token and each guess
        forward_parallel(&s->model, &s->run, c->tokens.data + c->n_past, T, c->n_past, n_logits);
        c->n_past = min(c->n_past + T, c->tokens.n);
    }
}

// Continues the text by up to max_new tokens (0: no limit), until a stop token, Ctrl-C or the end of the context.
//
// The loop also does speculative decoding. Guesses of the next tokens pass through the Transformer together with the
// last token. This takes little longer than the last token alone, because most of the time goes into loading the
// weights, once for the whole batch. Each token is still chosen by sampling. If it is the one that was guessed, the
// logits that follow it are already there; if not, the other guesses are dropped. The text is the same as without
// guesses: logits do not depend on how a text is split into batches, and guesses take no random numbers, only tokens
// that are chosen do. Guesses that are copied from the text are called prompt lookup.                    (Saxena 2023)
static void generate_reply(Session *s, size_t max_new) {
    Context *c = &s->context;
    size_t vocab_size = s->model.h.vocab_size, n_new = 0;
    size_t n_draft = 0, n_used = 0; // guesses in the last pass, and how many of them have been chosen

    // prefill
    double start = seconds();
    s->stats.n_prompt += c->tokens.n - c->n_past;
    evaluate(s, 0);
    s->stats.prefill_time += seconds() - start;
    start = seconds();

    while (!interrupted()) {
        // choose a token and print it
        const float *logits = s->run.logits + n_used * vocab_size;
        uint32_t token = sample(&s->sampler, logits, vocab_size);
        print_token(s, token, logits);
        n_new++;
        if (is_stop(s->tokenizer, token)) // it does not become part of the text
            break;

        // append it. If there is a next guess, it stands at data[n], which push overwrites, so compare them first
        bool guessed = n_used < n_draft && c->tokens.data[c->tokens.n] == token;
        push(&c->tokens, token);
        if (n_new == max_new || !make_room(s))
            break;

        // decode: get the logits that follow it
        s->stats.n_decoded++;
        if (guessed) { // the last pass has computed them. make_room has moved nothing, as guesses fit in the context.
            c->n_past++;
            n_used++;
            s->stats.n_accepted++;
        } else {
            n_draft = draft(s);
            n_used = 0;
            evaluate(s, n_draft);
        }
    }
    s->stats.n_generated += n_new;
    s->stats.decode_time += seconds() - start;
    end_reply(s);
}

// The default mode: prints the prompt and its continuation.
static void generate(Session *s) {
    encode(s->tokenizer, &s->context.tokens, read_prompt(s));
    size_t max_new = start_generation(s);
    print_prompt(s);
    generate_reply(s, max_new);
    print_stats(s);
}

// ------------------------------------------------------------------------------------------------
// 5 The tokenizer
//
// Byte-pair encoding (BPE) turns a text into tokens: it cuts the text into small pieces, the symbols, and merges
// neighbours into larger ones, in an order that was learned from a large text, until nothing is left to merge. There
// are two kinds. SentencePiece starts from characters; at the end, each character that is not in the vocabulary is
// replaced by one token per byte. Byte-level BPE starts from bytes. Before merging, a text is normalised and cut into
// words, and no merge crosses the end of a word. How models differ in all this is data in the tokenizer file. export.py
// has prepared it so that it can be used as it is: read into memory, checked once, and searched by bisection.

// The language model is complete. The rest of the program also needs these system headers, and these functions of
// sections 10 and 12.

#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
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

typedef ARRAY(unsigned char) Bytes;

#define expect_usage(condition, ...) ((condition) ? (void)0 : die(EXIT_USAGE, __VA_ARGS__))

#define VERSION "0.2.0"
#define DEFAULT_MODEL "models/stories.bin"

static double kv_cache_bytes(const Model *m, size_t context);
static RunState alloc_run_state(const Model *m, size_t context, size_t n_logits, size_t threads);
static const char *isa(void); // the instruction set

// FAST: the kernels of section 10. `make plain`: the plain loops of section 2.
#ifdef PLAIN
#define FAST 0
#else
#define FAST 1
#endif

// Several processes that run a model together, see section 12. Without -DMPI, process 0 is alone.
static int process, n_processes = 1;        // the rank of this process, from 0 on, and how many there are
static int error_fd = STDERR_FILENO;        // where die prints: in all processes but 0, stderr is /dev/null
static int exit_status;                     // not 0: the exit handler ends the other processes, too
static void share(void *data, size_t size); // copies data of process 0 to the others
static void gather_columns(float *out, size_t T, size_t n); // completes a matrix product

enum { SENTENCEPIECE_BPE = 1, BYTE_LEVEL_BPE = 2 }; // TokenizerHeader.kind
// Piece.type. NORMAL and BYTE tokens are the results of merging. USER_DEFINED tokens are searched for in the original
// text, LATE_USER_DEFINED ones in the normalised text. No text is ever encoded as a CONTROL token.
enum { NORMAL = 1, UNKNOWN = 2, CONTROL = 3, USER_DEFINED = 4, UNUSED = 5, BYTE = 6, LATE_USER_DEFINED = 7 };
enum { MAX_STOPS = 7, MAX_TEXT = 1 << 30, MAX_DFAS = 16 };
// Unicode's code points, and above them 256 numbers for bytes that are not valid UTF-8. A page is 256 of these numbers.
enum { N_CODEPOINTS = 0x110000, N_PAGES = N_CODEPOINTS / 256 + 1 };

enum { // TokenizerHeader.flags
    ADD_BOS = 1,
    ADD_DUMMY_PREFIX = 2,       // put a space in front of a text
    PREFIX_AFTER_SPECIAL = 4,   // also in front of a text that follows a control or user-defined token
    NO_PREFIX_BEFORE_SPACE = 8, // but never in front of a text that begins with a space
    MERGES_BY_RANK = 16,        // merge by the list of merges, else by the scores of the merged tokens
    IGNORE_MERGES = 32,         // a word that is in the vocabulary becomes that token, without merging
    REMOVE_EXTRA_SPACES = 64,   // remove spaces at both ends, and all but one of several in a row
    ALL_TOKENIZER_FLAGS = 127
};

// The texts that a chat template puts around the messages, in the order of the file; see models/FORMAT.md.
enum { BEFORE_USER, BEFORE_SYSTEM, AFTER_SYSTEM, AFTER_USER, BEFORE_ANSWER, AFTER_ANSWER, NEXT_USER };
enum { OPENS_ANSWER = NEXT_USER + 1, OPENS_ANSWER_NO_THINK, END_OF_THOUGHT, N_TEMPLATES };
// TokenizerHeader.template_flags; append_answer explains TRIM_NEWLINES and TRIM_SPACES.
enum { HAS_TEMPLATE = 1, HAS_SYSTEM = 2, TRIM_NEWLINES = 1024, TRIM_SPACES = 2048, HAS_NO_THINK = 4096 };
enum { SYSTEM_LAST = 8192, NO_EMPTY_SYSTEM = 16384, ALL_TEMPLATE_FLAGS = 32767 }; // see render_chat

#define NONE UINT32_MAX // no token, no symbol

// The start of a tokenizer file, byte for byte. The arrays of struct Tokenizer follow it in their order.
typedef struct {
    char magic[8];          // "twotoken"
    uint32_t version, kind; // version 3; SENTENCEPIECE_BPE or BYTE_LEVEL_BPE
    uint64_t hash;          // of everything after this field
    uint64_t file_size;     // in bytes
    uint64_t vocab_hash;    // the weights file has the same
    uint32_t flags, vocab_size;
    int32_t bos_id;   // the token that begins a text; -1: none
    int32_t unk_id;   // the unknown token, for text that the vocabulary cannot express; -1: none
    uint32_t n_stops; // tokens that end a text or an answer
    int32_t stop_ids[MAX_STOPS];
    uint32_t n_by_text, n_merges, n_dfas, n_classes, n_states; // lengths of arrays
    uint32_t template_flags, n_class_blocks, n_text;
    uint32_t template_ends[N_TEMPLATES]; // a template's items end here, and those of the next begin
} TokenizerHeader;
_Static_assert(sizeof(TokenizerHeader) == 160, "the compiler added padding to TokenizerHeader");

// A token of the vocabulary.
typedef struct {
    uint32_t offset, length; // what it prints, in Tokenizer.text
    uint32_t type;
    float score; // SentencePiece: of all possible merges, the one that makes the token with the highest score is next
} Piece;

typedef struct {
    uint32_t left, right, merged; // tokens
    uint32_t rank;                // the smallest rank is merged first
} Merge;

// A part of a template: a token, or if that is NONE, a text in Tokenizer.text.
typedef struct {
    uint32_t token, offset, length;
} TemplateItem;

// A part of a word that is on its way to becoming a token. The symbols are a linked list of indices: `previous` of the
// first one is NONE, and `next` of the last one is the number of symbols.
typedef struct {
    Span text;   // empty once it has been merged into the symbol before it
    uint32_t id; // NONE: not in the vocabulary
    uint32_t previous, next;
} Symbol;

struct Tokenizer {
    File file;
    TokenizerHeader h;
    const uint32_t *byte_id;     // (256)   the token of each byte, or unk_id
    const uint32_t *longest;     // (256)   the length of the longest user-defined token with this first byte
    const Piece *pieces;         // (V)
    const uint32_t *by_text;     // (n_by_text)  the tokens that text can become, sorted by their bytes
    const Merge *merges;         // (n_merges)   sorted by left and right
    const uint32_t *transitions; // (n_states, n_classes)  the automata that find words, see match_word
    const TemplateItem *items;   // (template_ends[N_TEMPLATES - 1])
    const uint32_t *class_block; // (N_PAGES)   the block of each 256 code points; only with automata
    const uint8_t *classes;      // (n_class_blocks, 256)   the class of each code point of a block
    const unsigned char *text;   // (n_text)
    uint32_t starts[0x10001];    // the texts with first_bytes f are by_text[starts[f]] to [starts[f + 1] - 1]
    bool prefix;                 // encode: the next text gets a space in front
    Bytes prompt;                // read_prompt: the text of -f
    Bytes normalised;            // encode: the text, with room for that space
    const unsigned char *words;  // encode_words: where the text starts
    Tokens states;               // match_word: for each byte of that text, the state of the last search that was there
    ARRAY(Symbol) symbols;       // encode_word: the symbols of a word
    Heap pairs;                  // encode_word: neighbours that can be merged, the next merge on top
};

static void append_bytes(Bytes *array, Span text) {
    reserve(array, text.n);
    if (text.n)
        memcpy(array->data + array->n, text.bytes, text.n);
    array->n += text.n;
}

static Span span_of(const char *string) { return (Span){(const unsigned char *)string, strlen(string)}; }

// Refuses a value in a file that is not from low to high.
static void check(const char *path, const char *name, double value, double low, double high) {
    expect(low < high || value == low, "%s: %s: expected %.10g, found %.10g", path, name, low, value);
    expect(value >= low && value <= high, "%s: %s: expected %.10g to %.10g, found %.10g", path, name, low, high, value);
}

// FNV-1a, over 32-bit words.
static uint64_t hash_of(const void *data, size_t size) {
    const uint32_t *words = data;
    uint64_t hash = 0xcbf29ce484222325;
    for (size_t i = 0; i < size / sizeof *words; i++)
        hash = (hash ^ words[i]) * 0x100000001b3;
    return hash;
}

static Span piece_text(const Tokenizer *t, uint32_t id) {
    return (Span){t->text + t->pieces[id].offset, t->pieces[id].length};
}

// Compares texts byte by byte (lexicographic order). A text that is the beginning of another comes before it.
static int compare(Span a, Span b) {
    int order = memcmp(a.bytes, b.bytes, min(a.n, b.n));
    if (order == 0)
        order = (a.n > b.n) - (a.n < b.n);
    return order;
}

// The first two bytes of a text as a number. Texts that are sorted by their bytes are sorted by this number, too.
static size_t first_bytes(Span text) { return (size_t)text.bytes[0] << 8 | (text.n > 1 ? text.bytes[1] : 0u); }

// Finds, by bisection, the last token in byte order that is not after this text, among the tokens that start with the
// same two bytes. Returns NONE if all of these come after it. If a token has exactly this text, it is the one found.
static uint32_t find_nearest(const Tokenizer *t, Span text) {
    size_t first = first_bytes(text), low = t->starts[first], high = t->starts[first + 1];
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (compare(piece_text(t, t->by_text[middle]), text) <= 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low > t->starts[first] ? t->by_text[low - 1] : NONE;
}

// The token with this text, NONE if there is none.
static uint32_t find_piece(const Tokenizer *t, Span text) {
    uint32_t id = find_nearest(t, text);
    if (id != NONE && compare(piece_text(t, id), text) != 0)
        return NONE;
    return id;
}

// The order of merges: by the left token, then by the right one.
static int compare_merges(const void *a, const void *b) {
    const Merge *x = a, *y = b;
    if (x->left != y->left)
        return x->left < y->left ? -1 : 1;
    return (x->right > y->right) - (x->right < y->right);
}

static void check_tokenizer_header(const char *path, const TokenizerHeader *h) {
    expect(h->version != 2, "%s: version: expected 3, found 2: run export.py again to make a new file", path);
    check(path, "version", h->version, 3, 3);
    check(path, "kind", h->kind, SENTENCEPIECE_BPE, BYTE_LEVEL_BPE);
    check(path, "flags", h->flags, 0, ALL_TOKENIZER_FLAGS);
    check(path, "vocab_size", h->vocab_size, 1, 1 << 24);
    check(path, "bos_id", h->bos_id, h->flags & ADD_BOS ? 0 : -1, h->vocab_size - 1);
    check(path, "unk_id", h->unk_id, -1, h->vocab_size - 1);
    check(path, "n_stops", h->n_stops, 0, MAX_STOPS);
    for (size_t i = 0; i < h->n_stops; i++)
        check(path, "stop id", h->stop_ids[i], 0, h->vocab_size - 1);
    check(path, "n_by_text", h->n_by_text, 0, h->vocab_size);
    check(path, "n_merges", h->n_merges, 0, 1 << 24);
    check(path, "n_dfas", h->n_dfas, 0, MAX_DFAS);
    uint32_t any_dfa = h->n_dfas > 0, any_class = h->n_classes > 0; // 0 or 1, so that the bounds below need no branches
    check(path, "n_classes", h->n_classes, 2 * any_dfa, 256);
    check(path, "n_states", h->n_states, h->n_dfas + any_dfa, 1 << 20);
    check(path, "n_class_blocks", h->n_class_blocks, any_class, N_PAGES * any_class);
    check(path, "template_flags", h->template_flags, 0, ALL_TEMPLATE_FLAGS);
    for (size_t i = 0; i < N_TEMPLATES; i++)
        check(path, "a template's end", h->template_ends[i], i ? h->template_ends[i - 1] : 0, 1 << 20);
}

// Checks every number that is used as an index, and every order that a search relies on.
static void check_tokenizer(const Tokenizer *t) {
    const char *path = t->file.path;
    const TokenizerHeader *h = &t->h;
    double last_id = h->vocab_size - 1;
    for (uint32_t id = 0; id < h->vocab_size; id++) {
        const Piece *p = &t->pieces[id];
        check(path, "a token's type", p->type, NORMAL, LATE_USER_DEFINED);
        check(path, "a token's score", p->score, -FLT_MAX, FLT_MAX);
        check(path, "a token's offset", p->offset, 0, h->n_text);
        check(path, "a token's length", p->length, p->type != UNUSED,
              (double)min(p->type == BYTE ? 1 : SIZE_MAX, h->n_text - p->offset));
    }
    for (size_t b = 0; b < 256; b++) {
        uint32_t id = t->byte_id[b];
        if (id == (uint32_t)h->unk_id && (id != NONE || h->kind == BYTE_LEVEL_BPE))
            continue;
        expect(id != NONE, "%s: expected a token for each byte, or an unk_id, found none for byte %zu", path, b);
        check(path, "a byte's token", id, 0, last_id);
        check(path, "the type of a byte's token", t->pieces[id].type, BYTE, BYTE);
    }
    for (size_t i = 0; i < h->n_by_text; i++) {
        check(path, "a sorted token", t->by_text[i], 0, last_id);
        uint32_t type = t->pieces[t->by_text[i]].type;
        expect(type == NORMAL || type == USER_DEFINED || type == LATE_USER_DEFINED,
               "%s: expected only sorted tokens of types 1, 4 and 7, found type %u", path, type);
        expect(i == 0 || compare(piece_text(t, t->by_text[i - 1]), piece_text(t, t->by_text[i])) < 0,
               "%s: expected tokens sorted by their bytes, found token %u after a larger one", path, t->by_text[i]);
    }
    for (size_t i = 0; i < h->n_merges; i++) {
        const Merge *merge = &t->merges[i];
        check(path, "a merge", (double)max(max(merge->left, merge->right), merge->merged), 0, last_id);
        check(path, "a merge's rank", merge->rank, 0, 1 << 24); // a float is exact up to there, see push_pair
        expect(i == 0 || compare_merges(merge - 1, merge) < 0, "%s: merge %zu is out of order", path, i);
    }
    for (size_t i = 0; i < (size_t)h->n_states * h->n_classes; i++)
        check(path, "a transition", t->transitions[i], 0, 2 * (double)h->n_states - 1);
    for (size_t i = 0; i < N_PAGES && h->n_classes; i++)
        check(path, "a block of classes", t->class_block[i], 0, h->n_class_blocks - 1);
    for (size_t i = 0; i < (size_t)h->n_class_blocks * 256; i++)
        check(path, "a character's class", t->classes[i], 0, h->n_classes - 1);
    for (size_t i = 0; i < h->template_ends[N_TEMPLATES - 1]; i++) {
        const TemplateItem *item = &t->items[i];
        check(path, "a template's token", item->token == NONE ? 0 : item->token, 0, last_id);
        check(path, "a template's offset", item->offset, 0, h->n_text);
        check(path, "a template's text", item->length, i >= h->template_ends[END_OF_THOUGHT - 1],
              h->n_text - item->offset);
    }
}

// Returns the array of `count` elements that starts at `*at`, and moves `*at` to the next array.
static const void *next_array(const Tokenizer *t, size_t *at, size_t count, size_t size) {
    size_t start = *at;
    *at = round_up(start + count * size, sizeof(uint32_t));
    return t->file.bytes + min(start, t->file.size);
}

static Tokenizer *open_tokenizer(const char *path) {
    Tokenizer *t = allocate(1, sizeof *t, "the tokenizer");
    *t = (Tokenizer){.file = map_file(path, "twotoken", sizeof t->h, "a tokenizer file")};
    // Unlike the mapped file, a copy of it cannot change after it has been checked.
    void *mapped = t->file.bytes;
    t->file.bytes = memcpy(allocate(t->file.size, 1, "a tokenizer file"), mapped, t->file.size);
    munmap(mapped, t->file.size);
    close(t->file.fd);
    memcpy(&t->h, t->file.bytes, sizeof t->h);
    const TokenizerHeader *h = &t->h;
    check_tokenizer_header(path, h);
    size_t at = sizeof *h;
    t->byte_id = next_array(t, &at, 256, sizeof *t->byte_id);
    t->longest = next_array(t, &at, 256, sizeof *t->longest);
    t->pieces = next_array(t, &at, h->vocab_size, sizeof *t->pieces);
    t->by_text = next_array(t, &at, h->n_by_text, sizeof *t->by_text);
    t->merges = next_array(t, &at, h->n_merges, sizeof *t->merges);
    t->transitions = next_array(t, &at, (size_t)h->n_states * h->n_classes, sizeof *t->transitions);
    t->items = next_array(t, &at, h->template_ends[N_TEMPLATES - 1], sizeof *t->items);
    t->class_block = next_array(t, &at, N_PAGES * (h->n_classes > 0), sizeof *t->class_block);
    t->classes = next_array(t, &at, h->n_class_blocks, 256);
    t->text = next_array(t, &at, h->n_text, 1);
    expect(at == t->file.size, "%s: file size: expected %zu bytes by its header, found %zu: incomplete or damaged",
           path, at, t->file.size);
    size_t start = offsetof(TokenizerHeader, file_size);
    uint64_t hash = hash_of(t->file.bytes + start, at - start);
    expect(hash == h->hash, "%s: hash: expected %016llx, found %016llx: damaged", path, (unsigned long long)h->hash,
           (unsigned long long)hash);
    check_tokenizer(t);
    for (uint32_t i = 0; i < h->n_by_text; i++)
        t->starts[first_bytes(piece_text(t, t->by_text[i])) + 1] = i + 1; // the last text with these bytes counts
    for (size_t i = 1; i < sizeof t->starts / sizeof *t->starts; i++)
        t->starts[i] = (uint32_t)max(t->starts[i], t->starts[i - 1]);
    return t;
}

// Decodes the first character of a text that is not empty. Returns its length in bytes; 0 if it is not valid UTF-8; -1
// if the text ends within a character that is valid so far.
static int decode_utf8(Span text, uint32_t *codepoint) {
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000}; // by length: a smaller code point has a shorter form
    int length = 0;                                               // the number of leading ones of the first byte
    while (*text.bytes << length & 0x80)
        length++;
    *codepoint = *text.bytes;
    if (length == 0)
        return 1;
    if (length == 1 || length > 4)
        return 0;
    uint32_t low = *text.bytes & (0x7fu >> length), high = low; // the range of what the bytes so far can become
    for (size_t i = 1; i < (size_t)length; i++) {
        if (i < text.n && (text.bytes[i] & 0xc0) != 0x80)
            return 0;
        low = low << 6 | (i < text.n ? text.bytes[i] & 0x3f : 0);
        high = high << 6 | (i < text.n ? text.bytes[i] & 0x3f : 0x3f);
    }
    if (high < least[length] || low >= N_CODEPOINTS || (low >= 0xd800 && high < 0xe000))
        return 0;
    *codepoint = low;
    return (size_t)length <= text.n ? length : -1;
}

// The length and the code point of the first character of a text. A byte that is not UTF-8 stands for itself.
static size_t next_char(Span text, uint32_t *codepoint) {
    int length = decode_utf8(text, codepoint);
    if (length > 0)
        return (size_t)length;
    *codepoint = N_CODEPOINTS + (uint32_t)*text.bytes;
    return 1;
}

static Span from(Span text, size_t at) {
    if (at == 0) // an empty text may be NULL, and NULL + 0 is undefined in C
        return text;
    return (Span){text.bytes + at, text.n - at};
}

// Normalises a text. SentencePiece's vocabularies write a space as U+2581, so a U+2581 in the text becomes a space.
// With REMOVE_EXTRA_SPACES, removes extra spaces. The result has room for a byte in front, for a space.
static Span normalise(Tokenizer *t, Span text) {
    bool sentencepiece = t->h.kind == SENTENCEPIECE_BPE, remove = t->h.flags & REMOVE_EXTRA_SPACES;
    reserve(&t->normalised, text.n + 1);
    unsigned char *start = t->normalised.data + 1, *end = start;
    for (size_t at = 0; at < text.n; at++) {
        *end = text.bytes[at];
        if (sentencepiece && text.n - at >= 3 && !memcmp(text.bytes + at, "\xe2\x96\x81", 3)) {
            *end = ' ';
            at += 2;
        }
        if (!remove || *end != ' ' || (end > start && end[-1] != ' '))
            end++;
    }
    if (remove && end > start && end[-1] == ' ')
        end--;
    return (Span){start, (size_t)(end - start)};
}

// Cuts a word into the symbols that merging starts from.
static void split_symbols(Tokenizer *t, Span word) {
    t->symbols.n = 0;
    for (size_t at = 0; at < word.n;) {
        Span text = {word.bytes + at, 1};
        uint32_t id = t->byte_id[*text.bytes], codepoint, n = (uint32_t)t->symbols.n;
        if (t->h.kind == SENTENCEPIECE_BPE) {
            text.n = next_char(from(word, at), &codepoint);
            id = find_piece(t, text);
        }
        at += text.n;
        if (id != NONE || t->h.kind == SENTENCEPIECE_BPE) // byte-level: a byte with no token and no unk_id is left out
            push(&t->symbols, ((Symbol){text, id, n - 1, n + 1}));
    }
}

// Adds the pair of the symbol `first` and the next one to the heap, if they can be merged.
static void push_pair(Tokenizer *t, uint32_t first) {
    const Symbol *symbols = t->symbols.data;
    if (first == NONE || symbols[first].next == t->symbols.n)
        return;
    const Symbol *a = &symbols[first], *b = &symbols[a->next];
    uint32_t length = (uint32_t)(a->text.n + b->text.n);
    if (t->h.flags & MERGES_BY_RANK) {
        Merge key = {a->id, b->id, NONE, 0};
        const Merge *merge = bsearch(&key, t->merges, t->h.n_merges, sizeof key, compare_merges);
        if (merge)
            heap_push(&t->pairs, (HeapEntry){-(float)merge->rank, first, merge->merged, length});
    } else {
        uint32_t merged = find_piece(t, (Span){a->text.bytes, length});
        if (merged != NONE)
            heap_push(&t->pairs, (HeapEntry){t->pieces[merged].score, first, merged, length});
    }
}

// Merges the best pair, or the leftmost of several equally good ones, again and again until none can be merged. With
// the heap, n symbols take O(n log n) steps.                                      (Sennrich, Haddow and Birch 2016)
static void merge_symbols(Tokenizer *t) {
    Symbol *symbols = t->symbols.data;
    for (uint32_t i = 0; i < t->symbols.n; i++)
        push_pair(t, i);
    while (t->pairs.n) {
        HeapEntry pair = heap_pop(&t->pairs);
        Symbol *first = &symbols[pair.index], *second = &symbols[first->next];
        if (first->text.n == 0 || first->next == t->symbols.n || first->text.n + second->text.n != pair.length)
            continue; // one of the two has been merged with another symbol since
        first->text.n += second->text.n;
        first->id = pair.merged;
        second->text.n = 0;
        first->next = second->next;
        if (first->next < t->symbols.n)
            symbols[first->next].previous = pair.index;
        push_pair(t, first->previous);
        push_pair(t, pair.index);
    }
}

// Encodes a word: merges its symbols. A symbol that is not in the vocabulary becomes one token per byte. A run of bytes
// that have no token becomes a single unknown token.
static void encode_word(Tokenizer *t, Tokens *tokens, Span word) {
    uint32_t whole = t->h.flags & IGNORE_MERGES ? find_piece(t, word) : NONE;
    if (whole != NONE) {
        push(tokens, whole);
        return;
    }
    split_symbols(t, word);
    merge_symbols(t);
    for (size_t i = 0; i < t->symbols.n; i++) {
        const Symbol *symbol = &t->symbols.data[i];
        if (symbol->id != NONE && symbol->text.n)
            push(tokens, symbol->id);
        for (size_t b = 0; b < symbol->text.n && symbol->id == NONE; b++) {
            uint32_t id = t->byte_id[symbol->text.bytes[b]];
            if (id != (uint32_t)t->h.unk_id || tokens->n == 0 || tokens->data[tokens->n - 1] != id)
                push(tokens, id);
        }
    }
}

// The length of the longest word that starts here; 0 if none does. An automaton (DFA) reads the characters one by
// one. Its next state follows from its state and the class of the character: a transition is twice the next state, plus
// 1 if the characters before this one are a word. State 0 ends the search; class 0 is the end of the text. export.py
// makes the automata from the regular expressions of the tokenizer.                                   (Thompson 1968)
//
// A search may read far beyond the word that it finds, and the next search starts right after that word. So the state
// in which a search reaches each character is remembered. If a search reaches a character in the same state as the
// search before, it cannot find more than that search did, and stops. Without this, the pattern "[a-z]*!|[a-z]" would
// take quadratic time. Patterns that count, such as "(aa)*!|a", still take quadratic time, because each search reaches
// a character in another state than the search before.                                                      (Reps 1998)
static size_t match_word(const Tokenizer *t, uint32_t state, Span text) {
    uint32_t *states = t->states.data + (text.bytes - t->words);
    size_t word = 0, at = 0;
    while (state) {
        uint32_t codepoint, class = 0;
        size_t length = 0;
        if (at < text.n) {
            length = next_char(from(text, at), &codepoint);
            class = t->classes[t->class_block[codepoint / 256] * 256 + codepoint % 256];
        }
        uint32_t transition = t->transitions[(size_t)state * t->h.n_classes + class];
        if (transition & 1)
            word = at;
        at += length;
        state = transition >> 1;
        if (length == 0 || states[at] == state)
            break;
        states[at] = state;
    }
    return word;
}

// Cuts a text into words. The first automaton finds words; each of them, and the text between them, is cut further by
// the next automaton. The pieces that the last one makes are encoded.
static void encode_words(Tokenizer *t, Tokens *tokens, Span text, uint32_t dfa) {
    if (text.n == 0)
        return;
    if (dfa == t->h.n_dfas) {
        encode_word(t, tokens, text);
        return;
    }
    size_t start = 0, at = 0; // the start and the end of the text between words
    while (at < text.n) {
        uint32_t codepoint;
        size_t n = match_word(t, 1 + dfa, from(text, at));
        if (n > 0) {
            encode_words(t, tokens, (Span){text.bytes + start, at - start}, dfa + 1);
            encode_words(t, tokens, (Span){text.bytes + at, n}, dfa + 1);
            start = at + n;
        }
        at += max(n, next_char(from(text, at), &codepoint));
    }
    encode_words(t, tokens, from(text, start), dfa + 1);
}

// The longest token of a user-defined type at the start of a text, NONE if there is none. A token that starts the text
// cannot be longer than what the text and its nearest token have in common, so few lengths have to be tried.
static uint32_t find_user_defined(const Tokenizer *t, Span text, uint32_t type) {
    text.n = min(text.n, t->longest[*text.bytes]);
    while (text.n > 0) {
        uint32_t id = find_nearest(t, text);
        size_t common = 1; // find_nearest misses tokens of one byte, so this length is tried at the end
        if (id != NONE) {
            Span token = piece_text(t, id);
            while (common < token.n && common < text.n && token.bytes[common] == text.bytes[common])
                common++;
            if (common == token.n && t->pieces[id].type == type)
                return id;
        }
        text.n = min(common, text.n - 1);
    }
    return NONE;
}

static void encode_between(Tokenizer *t, Tokens *tokens, Span text, uint32_t type);

// Finds the user-defined tokens of a type, and encodes what is between them.
static void encode_specials(Tokenizer *t, Tokens *tokens, Span text, uint32_t type) {
    size_t start = 0, at = 0; // the start and the end of the text between tokens
    while (at < text.n) {
        uint32_t token = find_user_defined(t, from(text, at), type);
        if (token == NONE) {
            at++;
            continue;
        }
        encode_between(t, tokens, (Span){text.bytes + start, at - start}, type);
        push(tokens, token);
        t->prefix = t->h.flags & PREFIX_AFTER_SPECIAL;
        at += t->pieces[token].length;
        start = at;
    }
    encode_between(t, tokens, from(text, start), type);
}

// Encodes the text between two user-defined tokens of a type. Between USER_DEFINED tokens, it is normalised and
// searched for LATE_USER_DEFINED ones. Between those, it is cut into words, which are encoded. The space in front is
// added after normalising, or with NO_PREFIX_BEFORE_SPACE only after the second search.
static void encode_between(Tokenizer *t, Tokens *tokens, Span text, uint32_t type) {
    if (text.n == 0)
        return;
    bool late = type == LATE_USER_DEFINED, prefix_late = t->h.flags & NO_PREFIX_BEFORE_SPACE;
    if (!late)
        text = normalise(t, text);
    if (t->prefix && late == prefix_late && text.n && !(late && *text.bytes == ' ')) {
        text = (Span){text.bytes - 1, text.n + 1}; // into the room that normalise left, or over an encoded byte
        *(unsigned char *)text.bytes = ' ';
    }
    if (late) {
        t->words = text.bytes;
        reserve(&t->states, text.n + 1);
        memset(t->states.data, 0, (text.n + 1) * sizeof *t->states.data);
        encode_words(t, tokens, text, 0);
    } else
        encode_specials(t, tokens, text, LATE_USER_DEFINED);
}

// Appends the tokens of a text. If there are no tokens yet, first adds bos, and puts a space in front of the text, if
// the tokenizer wants them. With PREFIX_AFTER_SPECIAL, the space is added also after a token that is not made by
// merges.
static void encode(Tokenizer *t, Tokens *tokens, Span text) {
    t->prefix = t->h.flags & ADD_DUMMY_PREFIX;
    if (tokens->n) {
        uint32_t last = t->pieces[tokens->data[tokens->n - 1]].type;
        t->prefix = t->h.flags & PREFIX_AFTER_SPECIAL && last != NORMAL && last != BYTE;
    } else if (t->h.flags & ADD_BOS) {
        push(tokens, (uint32_t)t->h.bos_id);
    }
    encode_specials(t, tokens, text, USER_DEFINED);
}

// Returns the text that a token prints at position `pos`. The first token of a text prints without the space that
// encode puts in front of a text.
static Span decode(const Tokenizer *t, uint32_t token, size_t pos) {
    Span text = piece_text(t, token);
    uint32_t type = t->pieces[token].type;
    if (type == UNKNOWN || type == CONTROL || type == UNUSED)
        return (Span){0};
    size_t first = (t->h.flags & ADD_BOS) != 0; // the position of the first token after bos
    if (pos == first && t->h.flags & ADD_DUMMY_PREFIX && *text.bytes == ' ')
        return from(text, 1);
    return text;
}

static bool is_stop(const Tokenizer *t, uint32_t token) {
    for (size_t i = 0; i < t->h.n_stops; i++)
        if ((int32_t)token == t->h.stop_ids[i])
            return true;
    return (int32_t)token == t->h.bos_id;
}

// ------------------------------------------------------------------------------------------------
// 6 Chat
//
// A chat model was trained on conversations in a fixed format, its chat template: control tokens and a few words stand
// before and after what the user and the model say. The model reads the whole conversation so far in this format, and
// its continuation is the answer. The part of the conversation that is in the KV cache already is not computed again.

// The limits of --draft (each guess takes memory for its logits) and of -j.
enum { MAX_DRAFT = 15, MAX_THREADS = 1024 };

// The values of the flags; section 8 describes them.
struct Options {
    const char *model, *tokenizer, *mode, *prompt, *prompt_file, *system;
    float temperature, top_p;
    uint64_t top_k, steps, context, threads, seed;
    uint64_t prefill, decode, repeat; // bench: tokens (0: default), and how often they are measured
    uint64_t stride;                  // perplexity: the distance between windows
    uint64_t draft;                   // the most tokens that are guessed at a time
    bool json, probs, no_think;
    bool adapt_threads; // -j was not given: fewer threads than `threads` may run, if that is faster
};

// How tokens are printed, and what of them has not been printed yet.
struct Printer {
    bool terminal;   // standard output is a terminal
    bool colours;    // tokens get the colour of their probability
    Bytes pending;   // the bytes of a character that is not complete yet
    int colour;      // the colour of these bytes
    bool skip_space; // spaces are not printed until something else has been
};

static void start_run(Session *s, size_t context); // allocates what generation needs; section 7

typedef struct {
    Bytes user;       // what the user said
    Tokens assistant; // the answer, as it was sampled: encoding its text might give other tokens
} Turn;

struct Chat {
    FILE *input;   // where the user's messages come from
    bool terminal; // they are typed on a terminal
    ARRAY(Turn) turns;
    size_t reply_start; // the index of the first token of the last turn's answer
    Bytes pending;      // text to encode after the tokens; pieces of text that meet are encoded together
    Bytes message;      // the message that is being read
};

// Returns the length in bytes of the whitespace character of Unicode that a text starts with, 0 if there is none.
static size_t leading_space(Span text) {
    if (text.n == 0)
        return 0;
    uint32_t c;
    size_t n = next_char(text, &c);
    bool ascii = (c >= '\t' && c <= '\r') || (c >= 0x1c && c <= ' ');
    bool wide = c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f;
    if (ascii || wide || c == 0x85 || c == 0xa0 || c == 0x3000)
        return n;
    return 0;
}

static void encode_pending(Session *s) {
    encode(s->tokenizer, &s->context.tokens, (Span){s->chat->pending.data, s->chat->pending.n});
    s->chat->pending.n = 0;
}

static void append_template(Session *s, size_t which) {
    const Tokenizer *t = s->tokenizer;
    for (size_t i = which ? t->h.template_ends[which - 1] : 0; i < t->h.template_ends[which]; i++) {
        TemplateItem item = t->items[i];
        if (item.token == NONE) {
            append_bytes(&s->chat->pending, (Span){t->text + item.offset, item.length});
        } else {
            encode_pending(s);
            push(&s->context.tokens, item.token);
        }
    }
}

// Each role has two bits of template_flags. They say whether the template trims a text of this role on the left (bit
// 2 + 2 * role) and on the right (bit 3 + 2 * role).
typedef enum { SYSTEM_TEXT, USER_AFTER_SYSTEM, OTHER_USER, ANSWER } Role;

static Span trimmed(const Session *s, Span text, Role role) {
    uint32_t trim = s->tokenizer->h.template_flags >> (2 + 2 * role);
    for (size_t n; trim & 1 && (n = leading_space(text)) > 0;)
        text = from(text, n);
    while (trim & 2 && text.n) {
        size_t last = text.n - 1; // where the last character starts
        while (last > 0 && (text.bytes[last] & 0xc0) == 0x80)
            last--;
        if (leading_space(from(text, last)) != text.n - last)
            break;
        text.n = last;
    }
    return text;
}

// Returns whether a text starts with what the template puts in front of an earlier answer.
static bool has_before_answer(const Tokenizer *t, Span text) {
    for (size_t i = t->h.template_ends[BEFORE_ANSWER - 1]; i < t->h.template_ends[BEFORE_ANSWER]; i++) {
        TemplateItem item = t->items[i];
        Span part = item.token == NONE ? (Span){t->text + item.offset, item.length} : piece_text(t, item.token);
        if (text.n < part.n || memcmp(text.bytes, part.bytes, part.n))
            return false;
        text = from(text, part.n);
    }
    return true;
}

// Appends an earlier answer. If the template drops the model's thought, up to the last END_OF_THOUGHT, or trims the
// answer, or adds something in front that the model has not said, appends the result as text.
// TRIM_NEWLINES and TRIM_SPACES say which characters after a thought go with it. Otherwise, appends the tokens as they
// were sampled.
static void append_answer(Session *s, Tokens answer) {
    const Tokenizer *t = s->tokenizer;
    const uint32_t *ends = t->h.template_ends;
    Bytes said = {0};
    for (size_t i = 0; i < answer.n; i++)
        append_bytes(&said, piece_text(t, answer.data[i]));
    Span text = trimmed(s, (Span){said.data, said.n}, ANSWER), rest = text;
    if (ends[END_OF_THOUGHT] > ends[END_OF_THOUGHT - 1]) {
        TemplateItem end = t->items[ends[END_OF_THOUGHT - 1]];
        for (size_t i = 0; i + end.length <= text.n; i++)
            if (!memcmp(text.bytes + i, t->text + end.offset, end.length))
                rest = from(text, i + end.length);
    }
    bool dropped = rest.n < text.n;
    for (size_t n; dropped && (n = leading_space(rest)) > 0; rest = from(rest, n))
        if (!(t->h.template_flags & (*rest.bytes == '\n' ? TRIM_NEWLINES : TRIM_SPACES)))
            break;
    if (rest.n < said.n || !has_before_answer(t, rest)) {
        append_template(s, BEFORE_ANSWER);
        append_bytes(&s->chat->pending, rest);
    } else { // the model itself has said what BEFORE_ANSWER adds, such as a space
        encode_pending(s);
        for (size_t i = 0; i < answer.n; i++)
            push(&s->context.tokens, answer.data[i]);
    }
    free(said.data);
}

// Renders the conversation to tokens, from turn `first` on. Messages are encoded as text only, so they cannot become
// control tokens. The system text stands before the first message, with SYSTEM_LAST before the last one. With
// NO_EMPTY_SYSTEM, an empty one is left out.
static void render_chat(Session *s, size_t first) {
    Chat *chat = s->chat;
    Context *c = &s->context;
    const char *system = s->options->system;
    uint32_t flags = s->tokenizer->h.template_flags;
    if (system && !*system && flags & NO_EMPTY_SYSTEM)
        system = NULL;
    const Tokens old = c->tokens;
    c->tokens = (Tokens){0};
    append_template(s, system ? BEFORE_SYSTEM : BEFORE_USER);
    for (size_t i = first; i < chat->turns.n; i++) {
        const Turn *turn = &chat->turns.data[i];
        Role role = OTHER_USER;
        if (system && i == (flags & SYSTEM_LAST ? chat->turns.n - 1 : first)) {
            append_bytes(&chat->pending, trimmed(s, span_of(system), SYSTEM_TEXT));
            append_template(s, AFTER_SYSTEM);
            role = USER_AFTER_SYSTEM;
        }
        append_bytes(&chat->pending, trimmed(s, (Span){turn->user.data, turn->user.n}, role));
        append_template(s, AFTER_USER);
        if (i + 1 < chat->turns.n) {
            append_answer(s, turn->assistant);
            append_template(s, AFTER_ANSWER);
            append_template(s, NEXT_USER);
        }
    }
    append_template(s, s->options->no_think ? OPENS_ANSWER_NO_THINK : OPENS_ANSWER);
    encode_pending(s);
    chat->reply_start = c->tokens.n;
    Tokens reply = chat->turns.data[chat->turns.n - 1].assistant; // its answer so far, if make_room calls
    for (size_t i = 0; i < reply.n; i++)
        push(&c->tokens, reply.data[i]);

    // The KV cache stays valid up to the first token that differs. The last token is computed anew, for its logits.
    size_t same = 0;
    while (same < c->n_past && same + 1 < c->tokens.n && old.data[same] == c->tokens.data[same])
        same++;
    c->n_past = same;
    free(old.data);
}

// Copies the tokens of the answer so far into the last turn.
static void keep_reply(Session *s) {
    Tokens *assistant = &s->chat->turns.data[s->chat->turns.n - 1].assistant;
    assistant->n = 0;
    for (size_t i = s->chat->reply_start; i < s->context.tokens.n; i++)
        push(assistant, s->context.tokens.data[i]);
}

// Shifts the context: if it is full, forgets turns from the oldest on, until half of it is free. Returns whether there
// is room now. If not even the last turn fits, nothing is forgotten.
static bool make_room(Session *s) {
    Context *c = &s->context;
    Chat *chat = s->chat;
    if (c->tokens.n <= c->max_tokens)
        return true;
    if (s->printer->terminal && (!chat || c->tokens.n > chat->reply_start)) // the cursor is after a part of the reply
        fputc('\n', stderr);
    fprintf(stderr, "run: the context of %zu tokens is full%s", c->max_tokens, chat ? ": " : "\n");
    if (!chat)
        return false;
    keep_reply(s);
    size_t first = 0; // the first turn that is kept
    while (first + 1 < chat->turns.n && c->tokens.n > c->max_tokens / 2)
        render_chat(s, ++first);
    if (c->tokens.n > c->max_tokens || c->tokens.n == 0) {
        fprintf(stderr, "this message and its answer alone take %zu tokens\n", c->tokens.n);
        return false;
    }
    fprintf(stderr, "the oldest turns (%zu) are forgotten, the rest is read again\n", first);
    for (size_t i = 0; i < first; i++) {
        free(chat->turns.data[i].user.data);
        free(chat->turns.data[i].assistant.data);
    }
    chat->turns.n -= first;
    memmove(chat->turns.data, chat->turns.data + first, chat->turns.n * sizeof *chat->turns.data);
    return true;
}

static void print_ids(Tokens tokens, const char *between) {
    for (size_t i = 0; i < tokens.n; i++)
        printf("%s%u", i ? between : "", tokens.data[i]);
}

// Answers a message. With --json, first prints an object with the tokens that the model reads.
static void chat_turn(Session *s, Span message) {
    Chat *chat = s->chat;
    Turn turn = {0};
    append_bytes(&turn.user, message);
    push(&chat->turns, turn);
    render_chat(s, 0);
    bool empty = s->context.tokens.n == 0;
    if (empty)
        fputs("run: an empty message is left out: the chat template adds no tokens to it\n", stderr);
    bool room = !empty && make_room(s);
    if (s->options->json) {
        printf("{\"cached\": %zu, \"prompt_tokens\": [", s->context.n_past);
        print_ids(s->context.tokens, ", ");
        puts("]}");
    }
    if (room) {
        s->printer->skip_space = true; // space in front of an answer belongs to the template
        generate_reply(s, s->options->steps);
        keep_reply(s);
    } else { // the message is left out; its line ends as after an answer
        fputs(s->options->json ? "" : "\n", stdout);
        free(turn.user.data);
        chat->turns.n--;
    }
}

// Ctrl-C sets this to 1. A signal handler can only reach global variables.
static volatile sig_atomic_t interrupts;

static bool interrupted(void) { return interrupts; }

// Exits from a signal handler, which may call very few functions.
static _Noreturn void exit_from_signal(int status, const char *message) {
    (void)!write(error_fd, message, strlen(message));
    _exit(status);
}

// The first Ctrl-C stops the answer. A second one, before the next message has been read, ends the program.
static void on_sigint(int signal) {
    (void)signal;
    if (interrupts)
        exit_from_signal(EXIT_INTERRUPTED, "\n");
    interrupts = 1;
}

// With SA_RESTART, Ctrl-C does not interrupt output. Without it, Ctrl-C ends the wait for a line. Of several processes,
// each ends at the first Ctrl-C.
static void install_sigint(int flags) {
    struct sigaction action = {.sa_handler = n_processes > 1 ? SIG_DFL : on_sigint, .sa_flags = flags};
    sigaction(SIGINT, &action, NULL);
}

// Gives all processes the text that process 0 has read, and `found`, whether there was one. Returns `found`.
static bool share_text(Bytes *text, bool found) {
    share(&found, sizeof found);
    share(&text->n, sizeof text->n);
    text->data = grow(text->data, &text->capacity, text->n, 1);
    share(text->data, text->n);
    return found;
}

// Opens a file for reading. NULL and "-" mean standard input. Only process 0 reads.
static FILE *open_text(const char *path) {
    if (process || !path || !strcmp(path, "-"))
        return stdin;
    FILE *file = fopen(path, "rb");
    expect(file, "%s: cannot read: %s", path, strerror(errno));
    return file;
}

// The text of -i or -f.
static Span read_prompt(Session *s) {
    const Options *o = s->options;
    if (!o->prompt_file)
        return span_of(o->prompt ? o->prompt : "");
    Bytes *text = &s->tokenizer->prompt;
    FILE *file = open_text(o->prompt_file);
    while (process == 0 && !feof(file) && !ferror(file)) {
        reserve(text, 1 << 16);
        text->n += fread(text->data + text->n, 1, 1 << 16, file);
        expect(text->n <= MAX_TEXT, "the prompt: expected at most %d bytes, found more", MAX_TEXT);
    }
    expect(!ferror(file), "%s: cannot read the prompt: %s", o->prompt_file, strerror(errno));
    fclose(file);
    share_text(text, true);
    return (Span){text->data, text->n};
}

// Reads a message: a line, and the next one as long as a line ends in a backslash. On a terminal, skips empty messages.
// Returns false at the end of the input.
static bool read_message(Chat *chat) {
    Bytes *message = &chat->message;
    char *line = NULL;
    size_t capacity = 0, start = 0; // where the line starts in the message
    bool more = true;
    message->n = 0;
    install_sigint(0);
    while (more && process == 0) {
        if (chat->terminal)
            fputs(message->n ? ". " : "> ", stderr);
        ssize_t n = getline(&line, &capacity, chat->input);
        bool interrupted = ferror(chat->input) && errno == EINTR;
        expect(interrupted || !ferror(chat->input), "cannot read the next message: %s", strerror(errno));
        if (n > 0)
            append_bytes(message, (Span){(unsigned char *)line, (size_t)n});
        if (interrupted) {
            clearerr(chat->input);
            if (chat->terminal) { // Ctrl-C drops what has been typed
                fputs("\n(press Ctrl-C again, or Ctrl-D, to leave)\n", stderr);
                message->n = start = 0;
            }
            continue;
        }
        if (n < 0)
            break;
        interrupts = 0;

        // remove the line ending; a backslash before it becomes a newline
        if (chat->terminal && line[n - 1] != '\n') // Ctrl-D ends a line, too
            fputc('\n', stderr);
        while (message->n > start && (message->data[message->n - 1] == '\n' || message->data[message->n - 1] == '\r'))
            message->n--;
        bool joined = message->n > start && message->data[message->n - 1] == '\\';
        if (joined)
            message->data[message->n - 1] = '\n';
        more = joined || (chat->terminal && message->n == 0);
        start = message->n;
    }
    install_sigint(SA_RESTART);
    free(line);
    return share_text(message, !more || message->n);
}

// Answers -i, and then each message from the terminal, from standard input, or from -f.
static void chat(Session *s) {
    const Options *o = s->options;
    const char *path = s->tokenizer->file.path;
    TokenizerHeader *h = &s->tokenizer->h;
    expect(h->template_flags & HAS_TEMPLATE,
           "%s: -m chat: expected a chat template, found none: export.py found none, or one that it cannot store",
           path);
    expect(!o->system || h->template_flags & HAS_SYSTEM, "%s: -y: its chat template takes no system prompt", path);
    expect(!o->no_think || h->template_flags & HAS_NO_THINK, "%s: --no-think: its chat template has no such option",
           path);
    h->flags &= ~(uint32_t)ADD_BOS; // bos is part of the template
    s->chat = allocate(1, sizeof *s->chat, "the conversation");
    *s->chat = (Chat){.input = open_text(o->prompt_file)};
    s->chat->terminal = isatty(fileno(s->chat->input)) && isatty(STDERR_FILENO);
    start_run(s, s->context.max_tokens);
    install_sigint(SA_RESTART);
    if (o->prompt)
        chat_turn(s, span_of(o->prompt));
    Bytes *message = &s->chat->message;
    while (read_message(s->chat))
        chat_turn(s, (Span){message->data, message->n});
    print_stats(s);
}

// ------------------------------------------------------------------------------------------------
// 7 Output and other modes

// The logarithm of the sum of e^logit. A logit minus this is the logarithm of the probability of its token.
static double log_sum_exp(const float *logits, size_t n) {
    double largest = (double)logits[argmax(logits, n)], sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += exp((double)logits[i] - largest);
    return largest + log(sum);
}

static void flush_output(void) {
    expect(!fflush(stdout) && !ferror(stdout), "standard output: cannot write: %s", strerror(errno));
}

typedef enum { PRINT_PLAIN, PRINT_TERMINAL, PRINT_QUOTED, PRINT_JSON } Style;

// Prints a text in one of these styles:
//   PRINT_PLAIN     as it is
//   PRINT_TERMINAL  bytes that are not UTF-8, and control characters except newline and tab, as \x1b, because a model
//                   must not control the terminal
//   PRINT_QUOTED    for use between quotes: \" \\ \n \t, other control characters as \u001b, bytes as above
//   PRINT_JSON      the same, but bytes that are not UTF-8, which JSON cannot express, become U+FFFD
static void print_text(Span text, Style style) {
    const char *special = "\n\t\"\\", *names = "nt\"\\";
    for (size_t at = 0, n; at < text.n; at += n) {
        uint32_t codepoint;
        n = next_char(from(text, at), &codepoint);
        const unsigned char *bytes = text.bytes + at;
        const char *found = codepoint ? strchr(special, *bytes) : NULL;
        bool stray = codepoint >= N_CODEPOINTS;
        bool control = codepoint < 0x20 || (codepoint >= 0x7f && codepoint < 0xa0);
        if (style >= PRINT_QUOTED && found)
            printf("\\%c", names[found - special]);
        else if (style == PRINT_JSON && stray)
            printf("\\ufffd");
        else if (style >= PRINT_QUOTED && control)
            printf("\\u%04x", codepoint);
        else if (style != PRINT_PLAIN && (stray || (control && !found)))
            for (size_t i = 0; i < n; i++)
                printf("\\x%02x", bytes[i]);
        else
            fwrite(bytes, 1, n, stdout);
    }
}

static void print_quoted(Span text, Style style) {
    putchar('"');
    print_text(text, style);
    putchar('"');
}

// The colours of --probs: of the 256 colours of a terminal, some that can be read on black and on white, and the least
// probability of each.
static const struct {
    double least;
    int colour;
} shades[] = {{0.8, 28}, {0.4, 64}, {0.1, 136}, {0.02, 166}, {0, 160}};

static int colour_of(double probability) {
    size_t i = 0;
    while (probability < shades[i].least)
        i++;
    return shades[i].colour;
}

static Printer *new_printer(const Options *o) {
    const char *no_color = getenv("NO_COLOR"); // https://no-color.org
    Printer *p = allocate(1, sizeof *p, "output");
    *p = (Printer){.terminal = isatty(STDOUT_FILENO)};
    p->colours = o->probs && !o->json && p->terminal && !(no_color && *no_color);
    return p;
}

static bool is_utf8(Span text) {
    uint32_t codepoint = 0;
    for (size_t at = 0; at < text.n && codepoint < N_CODEPOINTS;)
        at += next_char(from(text, at), &codepoint);
    return codepoint < N_CODEPOINTS;
}

// The number of bytes at the end of a text that may be the start of a character.
static size_t n_incomplete(Span text) {
    uint32_t codepoint;
    for (size_t n = min(text.n, 3); n > 0; n--)
        if (decode_utf8(from(text, text.n - n), &codepoint) < 0)
            return n;
    return 0;
}

// Prints a text piece by piece without splitting a character: the bytes of an incomplete one wait for the next piece.
// The text has one colour, 0: none. At the `end`, all bytes are printed.
static void stream_text(Printer *p, Span text, int colour, bool end) {
    for (size_t n; p->skip_space && (n = leading_space(text)) > 0;)
        text = from(text, n);
    p->skip_space = p->skip_space && text.n == 0 && !end;
    if (p->pending.n == 0)
        p->colour = colour;
    append_bytes(&p->pending, text);
    text = (Span){p->pending.data, p->pending.n};
    if (!end)
        text.n -= n_incomplete(text);
    if (text.n == 0)
        return;
    if (p->colour)
        printf("\x1b[38;5;%dm", p->colour);
    print_text(text, p->terminal ? PRINT_TERMINAL : PRINT_PLAIN);
    if (p->colour)
        fputs("\x1b[0m", stdout);
    p->pending.n -= text.n;
    memmove(p->pending.data, p->pending.data + text.n, p->pending.n);
}

// Prints a token at position pos as a JSON object without the closing brace, so that the caller can add to it. `text`
// is what the token prints. If this is not valid UTF-8, because a character is split between tokens, `bytes` has its
// bytes.
static void print_token_json(const Tokenizer *t, uint32_t token, size_t pos, double logprob) {
    Span text = decode(t, token, pos);
    printf("{\"id\": %u, \"text\": ", token);
    print_quoted(text, PRINT_JSON);
    if (!is_utf8(text)) {
        for (size_t i = 0; i < text.n; i++)
            printf("%s%u", i ? ", " : ", \"bytes\": [", text.bytes[i]);
        putchar(']');
    }
    printf(", \"logprob\": %.6f", logprob);
}

static size_t terminal_columns(void) {
    const char *set = getenv("COLUMNS");
    long columns = set ? atol(set) : 0;
    struct winsize size = {0};
    if (columns <= 0 && !ioctl(STDOUT_FILENO, TIOCGWINSZ, &size))
        columns = size.ws_col;
    if (columns <= 0)
        columns = 80;
    return min(max((size_t)columns, 20), 300);
}

// Prints the k most likely tokens at position pos: a JSON array, or a line each. The token comes last in a line, as its
// width on the terminal is not known.
static void print_top_k(Session *s, size_t k, size_t pos, const float *logits) {
    Heap *heap = &s->sampler.heap;
    size_t vocab_size = s->model.h.vocab_size, columns = min((terminal_columns() - 8) / 3, 40);
    double total = log_sum_exp(logits, vocab_size), best = (double)logits[argmax(logits, vocab_size)], rest = 1;
    heap->n = 0;
    for (size_t i = 0; i < vocab_size; i++)
        heap_push(heap, (HeapEntry){.key = logits[i], .index = (uint32_t)i});
    for (size_t i = 0; i < k && i < vocab_size; i++) {
        HeapEntry entry = heap_pop(heap);
        double logprob = (double)entry.key - total, probability = exp(logprob);
        rest -= probability;
        if (s->options->json) {
            fputs(i ? ", " : "[", stdout);
            print_token_json(s->tokenizer, entry.index, pos, logprob);
            printf(", \"prob\": %.6g}", probability);
            continue;
        }
        printf("%6.2f%% ", 100 * probability);
        size_t filled = (size_t)((double)columns * exp((double)entry.key - best) + 0.5);
        for (size_t column = 0; column < columns; column++)
            fputs(column < filled ? "█" : " ", stdout);
        putchar(' ');
        print_quoted(piece_text(s->tokenizer, entry.index), PRINT_QUOTED);
        puts(s->tokenizer->pieces[entry.index].type == CONTROL ? " (control)" : "");
    }
    if (s->options->json)
        putchar(']');
    else
        printf("%6.2f%% rest\n", 100 * fmax(rest, 0));
}

static void print_legend(void) {
    fputs("probability, at least:", stderr);
    for (size_t i = 0; i < sizeof shades / sizeof *shades; i++)
        fprintf(stderr, " \x1b[38;5;%dm%g%%\x1b[0m", shades[i].colour, 100 * shades[i].least);
    fputs("\n\n", stderr);
}

static void print_prompt(Session *s) {
    const Tokens *tokens = &s->context.tokens;
    for (size_t i = 0; i < tokens->n && !s->options->json; i++)
        stream_text(s->printer, decode(s->tokenizer, tokens->data[i], i), 0, false);
    flush_output();
}

// Prints a token that has been generated: its text, in the colour of its probability; with --json an object.
static void print_token(Session *s, uint32_t token, const float *logits) {
    const Options *o = s->options;
    size_t pos = s->context.n_past;
    double logprob = 0;
    if (o->json || s->printer->colours) // else not computed, as it takes as long as a layer of a small model
        logprob = (double)logits[token] - log_sum_exp(logits, s->model.h.vocab_size);
    if (o->json) {
        print_token_json(s->tokenizer, token, pos, logprob);
        if (o->probs) {
            fputs(", \"top\": ", stdout);
            print_top_k(s, o->top_k ? o->top_k : 5, pos, logits);
        }
        puts("}");
    } else if (!is_stop(s->tokenizer, token)) {
        int colour = s->printer->colours ? colour_of(exp(logprob)) : 0;
        stream_text(s->printer, decode(s->tokenizer, token, pos), colour, false);
    }
    flush_output();
}

// Ends the line of a text or an answer.
static void end_reply(Session *s) {
    stream_text(s->printer, (Span){0}, 0, true);
    if (!s->options->json)
        putchar('\n');
    flush_output();
}

static const char *dtype_name(const Model *m) { return m->h.dtype == BF16 ? "bf16" : "f16"; }

// The number of weights in the matrices of a layer.
static size_t layer_params(const Model *m) {
    const Layer *l = &m->layers[0];
    return (l->wqkv.rows + l->wo.cols + l->w_gate_up.rows + l->w_down.cols) * m->h.dim;
}

static size_t n_params(const Model *m) { return (m->file.size - HEADER_SPACE) / sizeof(uint16_t); }

// More threads than this do not help. They wait for each other several times per layer, which costs microseconds, and
// more on a busy machine. A thread is worth this if it multiplies at least 768 KB of a layer's weights.
static size_t max_useful_threads(const Model *m) {
    return FAST ? max(1, layer_params(m) * sizeof(uint16_t) / (768 << 10) / (size_t)n_processes) : 1;
}

// Allocates the memory to run the model on up to `context` tokens, with the logits of n_logits tokens at a time. On a
// terminal, prints a line that describes the run.
static void start_model(Session *s, size_t context, size_t n_logits) {
    const Model *m = &s->model;
    size_t threads = s->options->threads;
    if (!s->options->json && isatty(STDERR_FILENO))
        fprintf(stderr, "%s: %.*f M parameters, %s; context %zu, KV cache %.1f MB; %zu thread%s, %s\n", m->file.path,
                n_params(m) < 10000000, (double)n_params(m) / 1e6, dtype_name(m), context,
                kv_cache_bytes(m, context) / 1e6, threads, threads == 1 ? "" : "s", isa());
    s->run = alloc_run_state(m, context, n_logits, threads);
    s->run.adapt_threads = s->options->adapt_threads;
}

static void print_stats(const Session *s) {
    const Stats *stats = &s->stats;
    double prefill = (double)stats->n_prompt / fmax(stats->prefill_time, 1e-9); // no division by 0
    double decode = (double)stats->n_decoded / fmax(stats->decode_time, 1e-9);
    fprintf(stderr, "\nprefill: %zu tokens, %.*f tok/s; decode: %zu tokens, %.*f tok/s; seed %llu\n", stats->n_prompt,
            prefill < 10 ? 2 : 1, prefill, stats->n_generated, decode < 10 ? 2 : 1, decode,
            (unsigned long long)s->options->seed);
    if (s->options->draft)
        fprintf(stderr, "draft: %zu of %zu decoded tokens had been guessed\n", stats->n_accepted, stats->n_decoded);
}

// Allocates all that generation needs, for `context` tokens.
static void start_run(Session *s, size_t context) {
    const Options *o = s->options;
    start_model(s, context, 1 + o->draft);
    if (s->printer->colours && isatty(STDERR_FILENO))
        print_legend();
    s->sampler = (Sampler){.temperature = o->temperature, .top_p = o->top_p, .top_k = o->top_k, .random = o->seed};
    s->sampler.probabilities = allocate(s->model.h.vocab_size, sizeof *s->sampler.probabilities, "sampling");
}

// Checks the length of the prompt against -c and -n. An empty prompt becomes bos, with which texts began in training.
static size_t start_generation(Session *s) {
    Context *c = &s->context;
    int32_t bos = s->tokenizer->h.bos_id;
    if (c->tokens.n == 0 && bos >= 0)
        push(&c->tokens, (uint32_t)bos);
    size_t n = c->tokens.n, steps = s->options->steps, max_new = 0, context = c->max_tokens;
    expect(n, "an empty prompt: expected text (-i or -f), as %s has no bos token", s->tokenizer->file.path);
    expect(n <= context, "the prompt: expected at most %zu tokens (the context, -c), found %zu", context, n);
    if (steps) {
        size_t n_bos = (int32_t)c->tokens.data[0] == bos; // -n does not count it
        expect(n < steps + n_bos, "the prompt: expected fewer than %zu tokens (-n; 0 fills the context), found %zu",
               steps, n - n_bos);
        max_new = steps + n_bos - n;
        context = min(context, n + max_new - 1); // the last token does not pass through the model
    }
    start_run(s, context);
    return max_new;
}

// Encodes the prompt, which some modes cannot do without.
static void encode_text(Session *s) {
    const Options *o = s->options;
    expect_usage(o->prompt || o->prompt_file, "-m %s: expected a text, -i or -f", o->mode);
    encode(s->tokenizer, &s->context.tokens, read_prompt(s));
}

// Prints a result: a line, or in JSON, `separator` and then `"key": value`.
static void print_result(bool json, const char *separator, const char *key, const char *format, double value) {
    if (json)
        printf("%s\"%s\": ", separator, key);
    else
        printf("%-14s ", key);
    printf(format, value);
    fputs(json ? "" : "\n", stdout);
}

// -m tokenize: prints the token ids of the prompt on one line, as the model would receive them.
static void tokenize(Session *s) {
    encode(s->tokenizer, &s->context.tokens, read_prompt(s));
    const Tokens tokens = s->context.tokens;
    if (!s->options->json) {
        print_ids(tokens, " ");
        puts("");
        return;
    }
    fputs("{\"tokens\": [", stdout);
    print_ids(tokens, ", ");
    fputs("], \"pieces\": [", stdout);
    for (size_t i = 0; i < tokens.n; i++) {
        fputs(i ? ", " : "", stdout);
        print_quoted(piece_text(s->tokenizer, tokens.data[i]), PRINT_JSON);
    }
    fputs("]}\n", stdout);
}

// -m next: shows what may follow the prompt. If the prompt is longer than the context, takes its end.
static void next(Session *s) {
    const Options *o = s->options;
    size_t vocab_size = s->model.h.vocab_size;
    encode_text(s);
    Tokens *tokens = &s->context.tokens;
    size_t all = tokens->n, n = min(all, s->context.max_tokens);
    expect(all > 0, "the text is too short: expected at least 1 token, bos included, found 0");
    if (n < all) {
        memmove(tokens->data, tokens->data + all - n, n * sizeof *tokens->data);
        tokens->n = n;
        if (s->tokenizer->h.flags & ADD_BOS)
            tokens->data[0] = (uint32_t)s->tokenizer->h.bos_id;
        fprintf(stderr, "run: the prompt has %zu tokens; the context holds only the last %zu\n", all, n);
    }
    start_model(s, n, 1);
    evaluate(s, 0);
    const float *logits = s->run.logits;
    double total = log_sum_exp(logits, vocab_size), entropy = 0;
    for (size_t i = 0; i < vocab_size; i++) {
        double logprob = (double)logits[i] - total;
        entropy -= exp(logprob) * logprob / log(2);
    }
    if (o->json)
        printf("{\"tokens\": %zu, \"entropy_bits\": %.6f, \"next\": ", n, entropy);
    print_top_k(s, o->top_k ? o->top_k : 10, all, logits);
    if (o->json)
        puts("}");
    else
        printf("entropy %.2f bits\n", entropy);
}

// Exits if the logits (n, V) of the positions from pos on contain NaN or infinity.
static void check_finite(const Model *m, const float *logits, size_t n, size_t pos) {
    for (size_t t = 0; t < n; t++) {
        size_t bad = 0;
        for (size_t i = 0; i < m->h.vocab_size; i++)
            bad += !(fabsf(logits[t * m->h.vocab_size + i]) <= FLT_MAX);
        expect(bad == 0, "%s: %zu logits after position %zu are not finite: the weights contain NaN or are too large",
               m->file.path, bad, pos + t);
    }
}

enum { SCORED_AT_ONCE = 32 }; // tokens whose logits are in memory at the same time

// Computes the negative log likelihood of the tokens from `first` to n - 1 of a window: nll (n).
static void window_nll(Session *s, double *nll, const uint32_t *tokens, size_t n, size_t first) {
    const Model *m = &s->model;
    RunState *run = &s->run;
    size_t vocab_size = m->h.vocab_size;
    for (size_t at = 0, T; at + 1 < n; at += T) { // the last token is not followed by another
        T = min(run->batch, n - 1 - at);
        forward_parallel(m, run, tokens + at, T, at, 0);
        for (size_t i = max(at + 1, first), count; i <= at + T; i += count) {
            count = min(SCORED_AT_ONCE, at + T + 1 - i);
#pragma omp parallel num_threads((int)run->threads)
            {
                compute_logits(m, run, i - 1 - at, count); // the logits of token i are those after token i - 1
#pragma omp for
                for (size_t j = 0; j < count; j++) {
                    const float *logits = run->logits + j * vocab_size;
                    nll[i + j] = log_sum_exp(logits, vocab_size) - (double)logits[tokens[i + j]];
                }
            }
            check_finite(m, run->logits, count, i - 1);
        }
    }
}

// -m perplexity: how well the model predicts a text, in windows of the length of the context. Each window starts at the
// last token of the one before it. If the tokenizer begins texts with bos, bos replaces this token. So each token is
// scored once, except the first of the text. With --stride N, windows start N tokens apart, no token is replaced, and
// each window scores its tokens after the first that no window before it has scored.
static void perplexity(Session *s) {
    const Options *o = s->options;
    size_t context = s->context.max_tokens, stride = o->stride;
    expect_usage(context >= 2, "-c: expected at least 2 for -m perplexity, found %zu", context);
    expect_usage(stride <= context, "--stride: expected at most %zu, the context, found %zu", context, stride);
    encode_text(s);
    uint32_t *tokens = s->context.tokens.data;
    size_t all = s->context.tokens.n;
    context = min(context, all);
    expect(context >= 2, "the text is too short: expected at least 2 tokens, bos included, found %zu", context);
    stride = stride ? stride : context - 1;
    start_model(s, context, SCORED_AT_ONCE);
    double *nll = allocate(context, sizeof *nll, "the scores of a window");
    double sum = 0, squares = 0, count = 0, bytes = 0, start = seconds();
    size_t scored = 1; // the tokens before this one have been scored; nothing precedes the first
    for (size_t at = 0; scored < all; at += stride) {
        size_t n = min(context, all - at);
        if (!o->stride && s->tokenizer->h.flags & ADD_BOS)
            tokens[at] = (uint32_t)s->tokenizer->h.bos_id;
        size_t first = max(scored, at + 1) - at;
        window_nll(s, nll, tokens + at, n, first);
        for (size_t i = first; i < n; i++) {
            count++;
            sum += nll[i];
            squares += nll[i] * nll[i];
            bytes += (double)decode(s->tokenizer, tokens[at + i], at + i).n;
        }
        scored = at + n;
        if (isatty(STDERR_FILENO))
            fprintf(stderr, "\r%zu tokens%s", scored, scored < all ? "" : "\n");
    }
    free(nll);
    double tok_s = count / (seconds() - start), mean = sum / count;
    double variance = fmax(squares / count - mean * mean, 0) * count / fmax(count - 1, 1);
    // By the delta method, the standard error of e^mean is e^mean times that of the mean. JSON has no infinity.
    double result = fmin(exp(mean), DBL_MAX), error = fmin(result * sqrt(variance / count), DBL_MAX);
    print_result(o->json, "{", "tokens", "%.0f", count);
    print_result(o->json, ", ", "nll", "%.9g", mean);
    print_result(o->json, ", ", "perplexity", "%.9g", result);
    print_result(o->json, ", ", "stderr", "%.6g", error);
    print_result(o->json, ", ", "bits_per_byte", "%.9g", sum / log(2) / fmax(bytes, 1));
    print_result(o->json, ", ", "tok_s", "%.6g", tok_s);
    fputs(o->json ? "}\n" : "", stdout);
}

enum { MAX_REPEAT = 100 };

// A kind of work that -m bench measures.
typedef struct {
    const char *name;
    size_t tokens, pos, step; // the number of tokens, the position of the first, and the tokens of a pass
    const char *rate;         // the unit of the rate at which the work is done: gflops or gb_s
    double work;              // floating-point operations, or bytes read, per token
    double tok_s[MAX_REPEAT]; // tokens per second, once for each repetition
} Work;

enum { PREFILL, DECODE, DECODE_AT_END, N_WORKS };

// Fills in the three kinds of work: prefill of a prompt, and decode at the start and at the end of the context.
static void prepare_bench(Session *s, Work works[N_WORKS]) {
    const Options *o = s->options;
    const Model *m = &s->model;
    size_t context = s->context.max_tokens;
    if (!o->context)
        context = min(context, 4096);
    size_t prefill = o->prefill ? o->prefill : min(512, context);
    size_t decode = o->decode ? o->decode : min(64, context);
    expect_usage(max(prefill, decode) <= context, "--prefill, --decode: expected at most %zu, the context, found %zu",
                 context, max(prefill, decode));
    size_t tail = context - decode;
    s->context.max_tokens = context;
    start_model(s, context, 1);
    uint64_t random = 0;
    for (size_t i = 0; i < (size_t)(s->run.v - s->run.k) * 2; i++) { // as if there were tokens at all positions
        float value = (float)random_f64(&random) - 0.5f;
        convert_f32(s->run.k + i, s->run.kv_type, &value, 1);
    }
    for (size_t i = 0; i < context; i++)
        push(&s->context.tokens, (uint32_t)(random_f64(&random) * m->h.vocab_size));

    // A product with n weights takes 2n operations per token. Attention computes the dot products of each query with
    // the keys of the positions so far, (T + 1) / 2 on average, and the weighted sum of their values. The classifier
    // has as many weights as the embedding, and runs once per prompt. Decode reads all weights, but only a row of an
    // embedding that is not tied.
    double T = (double)prefill, layers = m->h.n_layers, embedding = (double)m->embedding.rows * m->h.dim;
    double flops = 2 * layers * ((double)layer_params(m) + (double)m->q_dim * (T + 1)) + 2 * embedding / T;
    double weights = (double)m->file.size - (m->h.flags & TIED ? 0 : 2 * embedding);
    double per_position = kv_cache_bytes(m, context) / (double)s->run.context;
    double bytes = weights + per_position * ((double)decode + 1) / 2;
    works[PREFILL] = (Work){"prefill", prefill, 0, prefill, "gflops", flops, {0}};
    works[DECODE] = (Work){"decode", decode, 0, 1, "gb_s", bytes, {0}};
    works[DECODE_AT_END] = (Work){"decode_at_end", decode, tail, 1, "gb_s", bytes + per_position * (double)tail, {0}};
}

// Computes the n tokens from position pos on.
static void eval_range(Session *s, size_t pos, size_t n) {
    s->context.n_past = pos;
    s->context.tokens.n = pos + n;
    evaluate(s, 0);
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_work(Work *w, size_t n, bool json) {
    qsort(w->tok_s, n, sizeof *w->tok_s, ascending);
    double tok_s = w->tok_s[n / 2], rate = tok_s * w->work / 1e9;
    if (json)
        printf(", \"%s\": {\"tokens\": %zu, \"position\": %zu, \"tok_s\": %.6g, \"tok_s_min\": %.6g, \"tok_s_max\": "
               "%.6g, \"%s\": %.6g}",
               w->name, w->tokens, w->pos, tok_s, w->tok_s[0], w->tok_s[n - 1], w->rate, rate);
    else
        printf("| %-13s | %6zu | %8zu | %9.2f | %9.2f | %9.2f | %-6s %7.1f |\n", w->name, w->tokens, w->pos, tok_s,
               w->tok_s[0], w->tok_s[n - 1], strcmp(w->rate, "gb_s") ? "GFLOPS" : "GB/s", rate);
}

// -m bench: measures tokens per second. `make bench` compares them with the limits of the machine.
static void bench(Session *s) {
    Work works[N_WORKS];
    const Options *o = s->options;
    const Model *m = &s->model;
    prepare_bench(s, works);
    eval_range(s, 0, 1); // once before measuring: loads the weights into memory
    for (size_t i = 0; i < o->repeat; i++)
        for (Work *w = works; w < works + N_WORKS; w++) {
            double start = seconds();
            for (size_t t = 0; t < w->tokens; t += w->step)
                eval_range(s, w->pos + t, w->step);
            w->tok_s[i] = (double)w->tokens / (seconds() - start);
        }
    uint64_t hash = hash_of(s->run.logits, m->h.vocab_size * sizeof(float)); // equal if two builds compute the same
    fputs(o->json ? "{\"model\": " : "", stdout);
    print_quoted(span_of(m->file.path), PRINT_JSON);
    printf(o->json ? ", \"params\": %zu, \"dtype\": \"%s\", \"file_bytes\": %zu, \"isa\": \"%s\", \"threads\": %zu, "
                     "\"context\": %zu, \"repeat\": %zu, \"logits_hash\": \"%016llx\""
                   : ": %zu parameters in %s, %zu bytes; %s; threads: %zu; context: %zu; median of %zu; logits "
                     "%016llx\n\n"
                     "| work          | tokens | position |     tok/s |       min |       max |           rate |\n"
                     "|---------------|-------:|---------:|----------:|----------:|----------:|---------------:|\n",
           n_params(m), dtype_name(m), m->file.size, isa(), (size_t)o->threads, s->context.max_tokens,
           (size_t)o->repeat, (unsigned long long)hash);
    for (Work *w = works; w < works + N_WORKS; w++)
        print_work(w, o->repeat, o->json);
    fputs(o->json ? "}\n" : "", stdout);
}

// ------------------------------------------------------------------------------------------------
// 8 The command line

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
    die(EXIT_USAGE, "-m: expected generate, chat, next, perplexity, tokenize or bench, found '%s'", name);
}

typedef struct {
    const char *flag;
    enum { TEXT, NUMBER, INTEGER, SWITCH } kind;
    void *target; // by kind: const char **, float *, uint64_t *, bool *
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
    expect_usage(good && (!end || (end > text && !*end)), "%s: expected a %s from %lld to %lld, found '%s'",
                 option->flag, option->kind == INTEGER ? "whole number" : "number", option->min, option->max, text);
}

#define NEXT_LINE "\n                 " // in the description of a flag

// Reads the command line. The table is also the text of --help; a flag that is "" is a heading there.
static Options parse_options(int argc, char **argv) {
    Options o = {.mode = "generate", .temperature = 1.0f, .top_p = 0.9f, .steps = UINT64_MAX, .repeat = 5};
    o.seed = (uint64_t)(seconds() * 1e6);
    bool help = false, version = false;
    const Option options[] = {
        {"-m", TEXT, &o.mode, 0, 0, "MODE",
         "generate: continue the prompt (default); chat: answer messages;" NEXT_LINE
         "next: show what may come next; perplexity: rate a text;" NEXT_LINE
         "tokenize: print token ids; bench: measure the speed"},
        {"-i", TEXT, &o.prompt, 0, 0, "TEXT", "prompt"},
        {"-f", TEXT, &o.prompt_file, 0, 0, "FILE", "prompt from a file; -: from standard input"},
        {"-y", TEXT, &o.system, 0, 0, "TEXT", "chat: system prompt"},
        {"-c", INTEGER, &o.context, 1, INT32_MAX, "N", "context in tokens (default: the model's)"},
        {"-j", INTEGER, &o.threads, 1, MAX_THREADS, "N", "threads (default: one per physical core)"},
        {"-z", TEXT, &o.tokenizer, 0, 0, "FILE",
         "tokenizer (default: MODEL.tokenizer.bin, else" NEXT_LINE "tokenizer.bin beside it or here)"},
        {"--no-think", SWITCH, &o.no_think, 0, 0, "", "chat: ask the model not to think, if its template knows how"},
        {"", SWITCH, NULL, 0, 0, "", "Sampling"},
        {"-n", INTEGER, &o.steps, 0, INT32_MAX, "N",
         "stop at N tokens, prompt included (default 256; 0: no limit);" NEXT_LINE
         "chat: N tokens per answer (default 0: until the model stops)"},
        {"-t", NUMBER, &o.temperature, 0, 1000000, "T", "temperature (default 1.0; 0: always the most likely token)"},
        {"-p", NUMBER, &o.top_p, 0, 1, "P", "top-p (default 0.9; 1: off)"},
        {"-k", INTEGER, &o.top_k, 0, INT32_MAX, "K", "top-k (default 0: off); next: tokens shown (default 10)"},
        {"-s", INTEGER, &o.seed, 0, INT64_MAX, "SEED", "random seed (default: time); same seed, same text"},
        {"--draft", INTEGER, &o.draft, 0, MAX_DRAFT, "N", "guess up to N tokens per step; same output (default 0)"},
        {"", SWITCH, NULL, 0, 0, "", "Output"},
        {"--probs", SWITCH, &o.probs, 0, 0, "", "colour tokens by probability; --json: list top K (default 5)"},
        {"--json", SWITCH, &o.json, 0, 0, "", "JSON: an object per token, or one for the result"},
        {"", SWITCH, NULL, 0, 0, "", "Measuring"},
        {"--stride", INTEGER, &o.stride, 1, INT32_MAX, "N", "perplexity: distance of windows (default: context - 1)"},
        {"--prefill", INTEGER, &o.prefill, 1, INT32_MAX, "N", "bench: tokens of the prompt (default 512)"},
        {"--decode", INTEGER, &o.decode, 1, INT32_MAX, "N", "bench: tokens to generate (default 64)"},
        {"--repeat", INTEGER, &o.repeat, 1, MAX_REPEAT, "N", "bench: repetitions (default 5)"},
        {"-h", SWITCH, &help, 0, 0, "", NULL},
        {"--help", SWITCH, &help, 0, 0, "", "show this text (also -h)"},
        {"--version", SWITCH, &version, 0, 0, "", "show the version and the instruction set"},
    };
    const Option *end = options + sizeof options / sizeof *options;
    for (int i = 1; i < argc; i++) {
        const Option *option = options;
        while (option < end && strcmp(argv[i], option->flag))
            option++;
        if (*argv[i] != '-') {
            expect_usage(!o.model, "expected one MODEL, found '%s' and '%s'", o.model, argv[i]);
            o.model = argv[i];
        } else if (option == end) {
            die(EXIT_USAGE, "unknown flag '%s'", argv[i]);
        } else if (option->kind == SWITCH) {
            *(bool *)option->target = true;
        } else if (++i == argc) {
            die(EXIT_USAGE, "%s: expected a value, found the end of the command line", option->flag);
        } else {
            set_option(option, argv[i]);
        }
    }
    if (help) {
        puts("usage: run [MODEL] [options]   MODEL: weights file (default " DEFAULT_MODEL ")");
        for (const Option *option = options; option < end; option++)
            if (!*option->flag)
                puts(option->help);
            else if (option->help)
                printf("  %s %-*s %s\n", option->flag, 13 - (int)strlen(option->flag), option->value, option->help);
        puts("Examples\n"
             "  run -t 0.8 -i \"Once upon a time\"\n"
             "  run models/smollm2.bin -m chat -y \"You are a pirate.\"\n"
             "  run model.bin -m perplexity -f book.txt --json");
    } else if (version) {
        printf("twofiles %s (%s)\n", VERSION, isa());
    }
    if (help || version) {
        flush_output();
        exit(0);
    }
    bool chats = !strcmp(o.mode, "chat");
    expect_usage(chats || !o.prompt || !o.prompt_file, "expected one of -i and -f, found both");
    if (o.steps == UINT64_MAX) // no -n
        o.steps = chats ? 0 : 256;
    return o;
}

// The length of a path without .bin at its end.
static int stem(const char *path) {
    size_t n = strlen(path);
    if (n >= 4 && !strcmp(path + n - 4, ".bin"))
        n -= 4;
    return (int)n;
}

// Searches for the tokenizer file: -z FILE, else MODEL.tokenizer.bin beside MODEL.bin, else tokenizer.bin beside it,
// else tokenizer.bin in the current directory. If MODEL is a symbolic link, searches beside the link, then beside its
// target.
static const char *tokenizer_path(const Options *o) {
    if (o->tokenizer)
        return o->tokenizer;
    char target[PATH_MAX];
    const char *names[] = {o->model, realpath(o->model, target) ? target : o->model};
    static char path[PATH_MAX + sizeof ".tokenizer.bin"];
    for (size_t i = 0; i < 5; i++) {
        const char *name = names[i % 2], *slash = strrchr(name, '/');
        int folder = i < 4 && slash ? (int)(slash + 1 - name) : 0;
        if (i < 2)
            snprintf(path, sizeof path, "%.*s.tokenizer.bin", stem(name), name);
        else
            snprintf(path, sizeof path, "%.*stokenizer.bin", folder, name);
        if (!access(path, F_OK))
            return path;
    }
    die(EXIT_ERROR, "%s: no tokenizer file: expected %.*s.tokenizer.bin, tokenizer.bin beside it or here, or -z FILE",
        o->model, stem(o->model), o->model);
}

// ------------------------------------------------------------------------------------------------
// 9 Plumbing

// ---- Errors and memory

static _Noreturn void die(int status, const char *format, ...) {
    va_list args;
    va_start(args, format);
    fflush(stdout);
    sleep((unsigned)process); // if several processes fail for the same reason, the first to print ends the others
    dup2(error_fd, STDERR_FILENO);
    fputs("run: ", stderr);
    if (process)
        fprintf(stderr, "process %d: ", process);
    vfprintf(stderr, format, args);
    fputs(status == EXIT_USAGE ? " (run --help shows the usage)\n" : "\n", stderr);
    va_end(args);
    exit_status = status;
    exit(status);
}

// Aligned to a cache line, because a vector load that reaches into a second line takes twice as long. One byte more,
// because for 0 bytes the result may be NULL.
static void *allocate(size_t count, size_t size, const char *what) {
    void *memory;
    expect(!posix_memalign(&memory, 64, count * size + 1), "no memory for %s: %.1f MB needed", what,
           (double)count * (double)size / 1e6);
    return memory;
}

// Gives an array room for n elements.
static void *grow(void *data, size_t *capacity, size_t n, size_t size) {
    if (n <= *capacity)
        return data;
    *capacity = 2 * n;
    data = realloc(data, *capacity * size);
    expect(data, "no memory for an array: %.1f MB needed", (double)*capacity * (double)size / 1e6);
    return data;
}

// Whether a comes before b in a heap.
static bool heap_before(HeapEntry a, HeapEntry b) { return a.key > b.key || (a.key == b.key && a.index < b.index); }

// A binary heap: the children of entry i are 2i + 1 and 2i + 2, and come after it.
static void heap_push(Heap *heap, HeapEntry entry) {
    push(heap, entry);
    HeapEntry *entries = heap->data;
    size_t i = heap->n - 1;
    while (i > 0 && heap_before(entry, entries[(i - 1) / 2])) {
        entries[i] = entries[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    entries[i] = entry;
}

static HeapEntry heap_pop(Heap *heap) {
    HeapEntry *entries = heap->data, top = entries[0];
    size_t i = 0, n = --heap->n;
    for (size_t child = 1; child < n; child = 2 * i + 1) {
        if (child + 1 < n && heap_before(entries[child + 1], entries[child]))
            child++;
        if (!heap_before(entries[child], entries[n]))
            break;
        entries[i] = entries[child];
        i = child;
    }
    entries[i] = entries[n];
    return top;
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

// ---- Files

_Static_assert(sizeof(Header) == 96, "the compiler added padding to Header");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the files are little-endian and used as they are");

// Refuses a damaged header. The bounds also keep every size that is computed from it below 2^63.
static void check_header(const Model *m) {
    const char *path = m->file.path;
    const Header *h = &m->h;
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
    check(path, "head_dim", h->head_dim, 2, MAX_HEAD_DIM);
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
    for (size_t i = sizeof *h; i < HEADER_SPACE; i++)
        check(path, "the unused bytes of the header", m->file.bytes[i], 0, 0);
}

static File map_file(const char *path, const char *magic, size_t min_size, const char *what) {
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); // a pipe must not block; it is refused below
    struct stat st;
    expect(fd >= 0 && !fstat(fd, &st), "%s: expected %s, made by python3 export.py CHECKPOINT -o MODEL.bin: %s", path,
           what, strerror(errno));
    expect(S_ISREG(st.st_mode), "%s: expected %s, found %s", path, what,
           S_ISDIR(st.st_mode) ? "a directory" : "a device or a pipe");
    size_t size = (size_t)st.st_size;
    char start[16] = {0};
    (void)!pread(fd, start, 15, 0);
    expect(strcmp(start, "version https:/"), "%s: expected %s, found a Git LFS pointer: run git lfs pull", path, what);
    expect(*start != '<', "%s: expected %s, found a web page (the download failed)", path, what);
    expect(size >= min_size, "%s: expected %s of at least %zu bytes, found %zu", path, what, min_size, size);
    File f = {path, mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0), size, fd};
    expect(f.bytes != MAP_FAILED, "%s: cannot map %zu bytes: %s", path, size, strerror(errno));

    // The most likely mistake is a file of another program, so the message shows how the file starts.
    for (char *c = start; c < start + 8; c++)
        if (*c < ' ' || *c > '~')
            *c = '.';
    expect(!memcmp(f.bytes, magic, 8),
           "%s: expected %s, which starts \"%s\", found \"%.8s\" (export.py converts other files)", path, what, magic,
           start);
    return f;
}

// ---- Number formats

// A float and its bits.
typedef union {
    uint32_t bits;
    float value;
} FloatBits;
static inline float float_from_bits(uint32_t bits) { return (FloatBits){.bits = bits}.value; }
static inline uint32_t float_bits(float value) { return (FloatBits){.value = value}.bits; }
static inline float bf16_to_f32(uint16_t h) { return float_from_bits((uint32_t)h << 16); }

// Rounds to nearest, ties to even. NaN stays NaN.
static inline uint16_t f32_to_bf16(float value) {
    uint32_t bits = float_bits(value);
    uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded >> 16);
}

// The exponent of an F16 is biased by 15, that of an F32 by 127. Multiplying by 2^112 corrects it, and makes subnormal
// numbers of F16 normal at the same time.
static inline float f16_to_f32(uint16_t h) {
    float magnitude = float_from_bits((uint32_t)(h & 0x7fff) << 13) * 0x1p112f;
    uint32_t special = (h & 0x7c00) == 0x7c00 ? 0x7f800000 : 0; // infinity or NaN
    return float_from_bits(float_bits(magnitude) | special | (uint32_t)(h & 0x8000) << 16);
}

// Rounds to nearest, ties to even. Numbers that are too large become infinity. Conditional expressions instead of
// branches let the compiler make vector code of this function.
static inline uint16_t f32_to_f16(float value) {
    uint32_t sign = float_bits(value) >> 16 & 0x8000;
    uint32_t bits = float_bits(value) & 0x7fffffff;
    uint32_t normal = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
    uint32_t subnormal = float_bits(float_from_bits(bits) + 0.5f) - 0x3f000000; // the addition rounds
    uint32_t half = bits < 0x38800000 ? subnormal : normal;                     // below 2^-14
    half = bits >= 0x477ff000 ? 0x7c00 : half;                                  // rounds to 65,536 or more: infinity
    half = bits > 0x7f800000 ? 0x7e00 : half;                                   // NaN
    return (uint16_t)(half | sign);
}

static inline size_t size_of(Dtype dtype) { return dtype == F32 ? sizeof(float) : sizeof(uint16_t); }

static inline const void *element_ptr(const void *array, Dtype dtype, size_t i) {
    return (const char *)array + i * size_of(dtype);
}

static inline float load_number(const void *array, Dtype dtype, size_t i) {
    if (dtype == F32)
        return ((const float *)array)[i];
    uint16_t h = ((const uint16_t *)array)[i];
    if (dtype == F16)
        return f16_to_f32(h);
    return bf16_to_f32(h);
}

static void convert_f32(void *out, Dtype dtype, const float *values, size_t n) {
    uint16_t *halves = out;
    if (dtype == F32)
        memcpy(out, values, n * sizeof *values);
    else if (dtype == F16)
        for (size_t i = 0; i < n; i++)
            halves[i] = f32_to_f16(values[i]);
    else
        for (size_t i = 0; i < n; i++)
            halves[i] = f32_to_bf16(values[i]);
}

// a * b + c, in one instruction if the CPU has one
static inline float fma_f32(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// e^x within 3 units in the last place; 0 below -87, and e^88 above 88. Compilers make vector code of this function,
// which they cannot do with libm's: x = n ln 2 + r, e^r is a polynomial, and 2^n goes straight into the exponent bits.
static inline float exp_f32(float x) {
    const float round = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer, left in the low bits of the mantissa
    float y = x > 88.0f ? 88.0f : x;
    float shifted = fma_f32(y, 1.44269504f, round);
    float n = shifted - round;
    float r =
        fma_f32(n, -1.42860677e-6f, fma_f32(n, -0.693145752f, y)); // ln 2 in two parts: n times the first is exact
    float p = fma_f32(1.0f / 720, r, 1.0f / 120);
    p = fma_f32(p, r, 1.0f / 24);
    p = fma_f32(p, r, 1.0f / 6);
    p = fma_f32(p, r, 0.5f);
    p = fma_f32(p, r, 1.0f);
    p = fma_f32(p, r, 1.0f);
    return y < -87.0f ? 0.0f : p * float_from_bits((float_bits(shifted) + 127) << 23);
}

// ---- The process

#ifdef __x86_64__
// Runs before main, so that no instruction that the CPU lacks is used before this check.
__attribute__((constructor)) static void check_cpu(void) {
    const char *missing = NULL;
    __builtin_cpu_init();
#ifdef __AVX512BF16__
    if (!__builtin_cpu_supports("avx512bf16"))
        missing = "AVX-512 BF16";
#endif
#ifdef __AVX512F__
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
        missing = "AVX-512";
#endif
#ifdef __AVX2__
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2"))
        missing = "AVX2";
#endif
    if (missing) {
        fprintf(stderr, "run: this program was built for CPUs with %s, which this CPU lacks: make portable\n", missing);
        _exit(EXIT_ERROR);
    }
}
#endif

#ifdef __linux__
// Reads one or two numbers from a file of the system. Where there is no number, `a` or `b` stays as it is.
__attribute__((format(printf, 3, 4))) static void read_numbers(double *a, double *b, const char *format, ...) {
    char path[2 * PATH_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(path, sizeof path, format, args);
    va_end(args);
    FILE *file = fopen(path, "r");
    if (!file)
        return;
    (void)!fscanf(file, "%lf %lf", a, b);
    fclose(file);
}

// Hyper-threads of a core share its arithmetic and its path to memory, so one thread per core is best.
static size_t physical_cores(void) {
    cpu_set_t allowed, cores; // a core is represented by its first hyper-thread
    CPU_ZERO(&cores);
    if (sched_getaffinity(0, sizeof allowed, &allowed))
        return 1;
    for (size_t cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        double first = (double)cpu, last;
        if (!CPU_ISSET(cpu, &allowed))
            continue;
        read_numbers(&first, &last, "/sys/devices/system/cpu/cpu%zu/topology/thread_siblings_list", cpu);
        CPU_SET((size_t)first, &cores);
    }
    return (size_t)CPU_COUNT(&cores);
}

// The number of CPUs that the quota of CPU time allows, rounded up, at most MAX_THREADS. Containers often have a quota:
// so many microseconds of CPU time in each period. The quotas of the control groups above count, too.
static size_t cpu_quota(void) {
    char line[PATH_MAX];
    double cpus = MAX_THREADS;
    FILE *file = fopen("/proc/self/cgroup", "r");
    while (file && fgets(line, sizeof line, file)) {
        // version 2: "0::/group"; version 1: "4:cpu,cpuacct:/group", with the controllers in any order
        char *rest = line;
        strsep(&rest, ":");
        char *controllers = strsep(&rest, ":"), *group = strsep(&rest, "\n");
        bool version_1 = controllers && *controllers, limits_cpu = !version_1;
        for (char *name; (name = strsep(&controllers, ","));)
            limits_cpu |= !strcmp(name, "cpu");
        if (!group || !limits_cpu)
            continue;
        for (char *end = group + strlen(group); end; end = strrchr(group, '/')) {
            *end = 0; // the group, then those above it
            double quota = 0, period = 0, none;
            if (version_1) {
                read_numbers(&quota, &none, "/sys/fs/cgroup/cpu%s/cpu.cfs_quota_us", group); // -1: no limit
                read_numbers(&period, &none, "/sys/fs/cgroup/cpu%s/cpu.cfs_period_us", group);
            } else {
                read_numbers(&quota, &period, "/sys/fs/cgroup%s/cpu.max", group); // "max 100000": no limit
            }
            if (quota > 0 && period > 0)
                cpus = fmin(cpus, ceil(quota / period));
        }
    }
    if (file)
        fclose(file);
    return (size_t)cpus;
}

static size_t default_threads(void) { return min(physical_cores(), cpu_quota()); }
#else
static size_t default_threads(void) {
    return (size_t)fmin(fmax(1, (double)sysconf(_SC_NPROCESSORS_ONLN)), MAX_THREADS);
}
#endif

// A page of the mapped file cannot be read: its disk failed, or another program has made the file shorter.
static void on_sigbus(int signal) {
    (void)signal;
    exit_from_signal(EXIT_ERROR, "run: cannot read the weights file any more: it was made shorter while it was "
                                 "open, or its disk failed\n");
}

static void prepare_process(char **argv) {
    // If a standard descriptor is closed, the next file that is opened would get its number. So /dev/null takes its
    // place, opened in the wrong direction, so that reading or writing still fails.
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (fcntl(fd, F_GETFD) < 0)
            open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY);
    sigaction(SIGBUS, &(struct sigaction){.sa_handler = on_sigbus}, NULL);
#if defined(_OPENMP) && defined(__linux__)
    // OpenMP's threads wait by spinning, for milliseconds. If another program occupies a core, a spinning thread can
    // keep the thread that it waits for from running, so this setting makes them spin less. OpenMP reads it only when
    // the program starts, so the program starts itself again.
    if (!getenv("GOMP_SPINCOUNT") && !getenv("OMP_WAIT_POLICY") && !setenv("GOMP_SPINCOUNT", "3000", 1))
        execv("/proc/self/exe", argv);
#endif
    (void)argv;
}

// ------------------------------------------------------------------------------------------------
// 10 Fast kernels
//
// The loops of section 2 on vectors of W floats. Each instruction set supplies a few functions on vectors, and the
// kernels are written once, on these functions.
//
// Each sum is computed in CHAINS accumulators of W lanes: accumulator j takes the vectors j, j + CHAINS, ... of the
// operands. The additions of an accumulator wait for each other. So a kernel with few sums works on all accumulators of
// a sum at the same time. A kernel with many sums takes the accumulators one after the other, because its sums do not
// wait for each other. Both compute the same sums, bit for bit.

enum {
    MR = 4,             // rows of weights that the micro-kernel multiplies at a time
    MC = 128,           // rows of weights that stay in L2 while all tokens are multiplied with them
    KC_BYTES = 4096,    // bytes of each token's row of x that are multiplied at a time
    TOKENS_IN_L1 = 6,   // tokens that stay in L1 while the rows of a block stream past
    AMX_BLOCK = 32,     // AMX: rows and tokens that are multiplied at a time, and columns that an instruction takes
    AMX_TOKENS = 256,   // AMX: tokens in the block of x that stays in L2 while all rows are multiplied with it
    AMX_COLUMNS = 2048, // AMX: columns in this block
    KV_BLOCK = 64,      // keys and values that attention handles at a time
    Q_BLOCK = 64,       // queries that are multiplied with a block of keys while it is in cache
    Q_TILE = 4          // queries that share each key and value that is loaded
};

static void page_weights(Paging *p, Tensor w); // section 11
static Paging *open_paging(const Model *m);

#define INLINE static inline __attribute__((always_inline))

// W: floats in a vector. NR: tokens in the micro-kernel; NV: vectors of columns in attention. Both are such that the
// sums fit in registers. CHAINS: accumulators of a sum; PAIR_CHAINS: the same for pairs of bf16.

#if FAST && defined(__AVX512F__) && defined(__AVX512DQ__)

#include <immintrin.h>
#define ISA "AVX-512"
enum { W = 16, CHAINS = 1, PAIR_CHAINS = 1, NR = 6, NV = 4 };
typedef __m512 vec;
INLINE vec load_bf16(const uint16_t *p) {
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}
INLINE vec load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
INLINE vec fma_vec(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE __m128 sum4(vec a, vec b, vec c, vec d) {
    __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    vec all = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)) + _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#ifdef __AVX512BF16__
INLINE vec bf16_dot_vec(vec a, vec b, vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
#if defined(__AMX_BF16__) && defined(__linux__)
#include <sys/syscall.h>
#define AMX
#define BF16_DOT "AMX BF16"
#else
#define BF16_DOT "AVX-512 BF16"
#endif
#endif

#elif FAST && defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>
#define ISA "AVX2"
enum { W = 8, CHAINS = 4, PAIR_CHAINS = 1, NR = 3, NV = 2 };
typedef __m256 vec;
INLINE vec load_bf16(const uint16_t *p) {
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}
INLINE vec load_f16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
INLINE vec fma_vec(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE __m128 sum4(vec a, vec b, vec c, vec d) {
    __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

#elif FAST && defined(__ARM_NEON) && defined(__aarch64__)

#include <arm_neon.h>
#define ISA "NEON"
enum { W = 4, CHAINS = 4, PAIR_CHAINS = 4, NR = 6, NV = 4 };
typedef float32x4_t vec;
INLINE vec load_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
INLINE vec load_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
INLINE vec fma_vec(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
INLINE vec sum4(vec a, vec b, vec c, vec d) { return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)); }
#ifdef __ARM_FEATURE_BF16_VECTOR_ARITHMETIC
#define BF16_DOT "NEON BF16"
INLINE vec bf16_dot_vec(vec a, vec b, vec c) {
    return vbfdotq_f32(c, vreinterpretq_bf16_f32(a), vreinterpretq_bf16_f32(b));
}
#endif

#else // any other CPU, and the plain program: the vectors of gcc and clang

#define ISA (FAST ? "portable" : "plain C")
enum { W = 4, CHAINS = 4, PAIR_CHAINS = 1, NR = 3, NV = 2 };
typedef float vec __attribute__((vector_size(16)));
INLINE vec load_bf16(const uint16_t *p) {
    return (vec){bf16_to_f32(p[0]), bf16_to_f32(p[1]), bf16_to_f32(p[2]), bf16_to_f32(p[3])};
}
INLINE vec load_f16(const uint16_t *p) {
    return (vec){f16_to_f32(p[0]), f16_to_f32(p[1]), f16_to_f32(p[2]), f16_to_f32(p[3])};
}
INLINE vec fma_vec(vec a, vec b, vec c) { return a * b + c; }
INLINE vec sum4(vec a, vec b, vec c, vec d) {
    return (vec){a[0] + a[1], b[0] + b[1], c[0] + c[1], d[0] + d[1]} +
           (vec){a[2] + a[3], b[2] + b[3], c[2] + c[3], d[2] + d[3]};
}
#endif

#ifdef BF16_DOT
static bool has_bf16_dot(void) { return true; }
static const char *isa(void) { return BF16_DOT; }
#else
INLINE vec bf16_dot_vec(vec a, vec b, vec c) { return fma_vec(a, b, c); } // is never called
static bool has_bf16_dot(void) { return false; }
static const char *isa(void) { return ISA; }
#endif

// With one token: how many bytes ahead the weights are prefetched, and into which cache (3: L1, 2: L2). The first
// values were fastest on Zen 5, which is recognised by its AVX-VNNI, the second ones on Zen 4 and Xeons.
#if defined(__AVXVNNI__) && !defined(AMX)
enum { PREFETCH_BYTES = 4096, PREFETCH_LOCALITY = 3 };
#else
enum { PREFETCH_BYTES = 3072, PREFETCH_LOCALITY = 2 };
#endif

// ---- The order of numbers in memory

// Returns the type of xb. The bf16 dot product takes both sides in bf16.
static Dtype choose_xb_type(uint32_t weights) {
    if (weights != BF16 || !has_bf16_dot())
        return F32;
#ifdef AMX
    // Linux gives the tile registers only to programs that ask for them.
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
    expect(syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0,
           "the system does not allow AMX: %s; without it: make ARCH='-march=native -mno-amx-bf16'", strerror(errno));
    return BF16_AMX;
#endif
    return BF16;
}

// The distance between rows of xb, in elements. If it were a power of two, all rows would compete for the same sets of
// the cache. With AMX, the rows of 16 tokens are interleaved, so this does not matter.
static size_t xb_stride(Dtype dtype, size_t cols) {
    return dtype == BF16_AMX ? round_up(cols, AMX_BLOCK) : round_up(cols, 64) + 32;
}

static Tensor xb_view(const RunState *s, size_t T, size_t cols) {
    return (Tensor){s->xb, s->xb_type, T, cols, xb_stride(s->xb_type, cols)};
}

// Where element (r, c) of a matrix is. BF16_AMX is (T/16, cols/2, 16, 2): pairs of columns of 16 tokens stand together.
static inline size_t element_index(Tensor a, size_t r, size_t c) {
    if (a.dtype == BF16_AMX)
        return r / 16 * 16 * a.stride + c / 2 * 32 + r % 16 * 2 + c % 2;
    return r * a.stride + c;
}

static inline float element(Tensor a, size_t r, size_t c) {
    return load_number(a.data, a.dtype, element_index(a, r, c));
}

static void store_row(Tensor a, size_t r, size_t c, const float *values, size_t n) {
    if (a.dtype != BF16_AMX) {
        convert_f32((char *)a.data + element_index(a, r, c) * size_of(a.dtype), a.dtype, values, n);
        return;
    }
    uint16_t *to = (uint16_t *)a.data + element_index(a, r, c); // c is even, and pairs are 32 numbers apart
    for (size_t i = 0; i < n; i += AMX_BLOCK) {
        uint16_t some[AMX_BLOCK] = {0};
        convert_f32(some, BF16, values + i, min(AMX_BLOCK, n - i));
        for (size_t j = 0; j < AMX_BLOCK && i + j < n; j += 2)
            memcpy(to + (i + j) * 16, some + j, 2 * sizeof *some);
    }
}

// Returns `rows` rows of a matrix, from row r on, and of these `cols` columns, from column c on. With BF16_AMX, r has
// to be a multiple of 16 and c of 2.
static inline Tensor slice(Tensor a, size_t r, size_t rows, size_t c, size_t cols) {
    return (Tensor){(char *)a.data + element_index(a, r, c) * size_of(a.dtype), a.dtype, rows, cols, a.stride};
}

// bf16 numbers of the KV cache are stored in pairs (P = 2), which the bf16 dot product takes together.
static inline size_t pair_size(const RunState *s) { return s->kv_type == BF16 ? 2 : 1; }

// Where the KV cache holds a block of KV_BLOCK keys, or values, of kv head g. `pos` is the position of the first one.
static inline size_t kv_offset(const Model *m, const RunState *s, size_t layer, size_t g, size_t pos) {
    return ((layer * m->h.n_kv_heads + g) * s->context + pos) * m->h.head_dim;
}

// Blocks of keys are transposed, (d/P, KV_BLOCK, P), so that scores are weighted sums of rows, as outputs are, see
// attention_block. Blocks of values are (KV_BLOCK/P, d, P).
static inline size_t k_index(const Model *m, const RunState *s, size_t layer, size_t g, size_t pos, size_t i) {
    size_t P = pair_size(s), slot = pos % KV_BLOCK;
    return kv_offset(m, s, layer, g, pos - slot) + (i / P * KV_BLOCK + slot) * P + i % P;
}

static inline size_t v_index(const Model *m, const RunState *s, size_t layer, size_t g, size_t pos, size_t i) {
    size_t P = pair_size(s), slot = pos % KV_BLOCK;
    return kv_offset(m, s, layer, g, pos - slot) + (slot / P * m->h.head_dim + i) * P + slot % P;
}

// ---- Memory of a running model

enum { MAX_BATCH = 512, BATCH_BYTES = 48 << 20 }; // the largest T, and the memory that its activations may take

// The bytes of the KV cache. May be more than memory can address.
static double kv_cache_bytes(const Model *m, size_t context) {
    return 2 * (double)m->h.n_layers * (double)m->kv_dim * (double)round_up(context, KV_BLOCK) * sizeof(uint16_t);
}

// Another program that occupies a core slows down all threads: at the end of each loop, they wait for the thread that
// has lost its core. Then fewer threads are faster, even a single one. So a smaller team is tried when a pass of one
// token takes longer than usual, or has not been tried for long, and a larger one every quarter of a second. The
// fastest is kept. Results do not depend on the size of the team. A larger batch always uses all threads: its loops are
// so long that one wait costs little.
struct Team {
    size_t all, size;              // the threads for a larger batch, and for a few tokens
    double times[MAX_THREADS + 1]; // how long a pass of one token takes with each size, in seconds; 0: not known
    double next_try;               // when a larger team is tried again
};

// Allocates the memory for `context` positions, and for the logits of up to n_logits tokens at a time.
static RunState alloc_run_state(const Model *m, size_t context, size_t n_logits, size_t threads) {
    size_t D = m->h.dim, F = m->h.hidden_dim, Q = m->q_dim, K = m->kv_dim, d = m->h.head_dim;
    size_t widest = max(max(D, Q), F), outputs = max(Q + 2 * K, 2 * F); // per token: input and output of a product
    const char *what = "the activations";
    RunState s = {.threads = threads, .context = round_up(context, KV_BLOCK)};
    s.team = allocate(1, sizeof *s.team, what);
    *s.team = (struct Team){.all = threads, .size = threads};
    s.xb_type = choose_xb_type(m->h.dtype);
    s.kv_type = s.xb_type == BF16 ? BF16 : F16; // a CPU that has AMX is slow at bf16 dot products of vectors
    size_t per_token = (D + outputs + d) * sizeof(float) + xb_stride(s.xb_type, widest) * size_of(s.xb_type);
    // the logits take a part of BATCH_BYTES, at most half
    size_t room = BATCH_BYTES - min(BATCH_BYTES / 2, n_logits * m->h.vocab_size * sizeof(float));
    s.batch = min(min(max(room / per_token, 1), MAX_BATCH), context);

    // mmap gives zeroed pages when they are first touched. Zeros matter: a pair of bf16 may include one position past
    // the last. Its weight is 0, but 0 times NaN is NaN. 64 bytes more, because kernels read past the end.
    double bytes = kv_cache_bytes(m, context);
    size_t size = (size_t)fmin(bytes, 0x1p62) + 64; // 2^62: more than any machine has
    s.k = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    expect(s.k != MAP_FAILED, "%s: no memory for a KV cache of %zu positions: %.1f MB needed; -c sets fewer",
           m->file.path, context, bytes / 1e6);
    s.v = s.k + (size_t)bytes / 2 / sizeof *s.v;
    s.x = allocate(s.batch * D, sizeof *s.x, what);
    s.qkv = s.gate_up = allocate(s.batch * outputs, sizeof *s.qkv, what);
    s.xb = allocate(round_up(s.batch, AMX_BLOCK) * xb_stride(s.xb_type, widest), size_of(s.xb_type), what);
    s.logits = allocate(n_logits * m->h.vocab_size, sizeof *s.logits, "the logits");
    s.rope_cos = allocate(s.batch * d / 2, sizeof *s.rope_cos, what);
    s.rope_sin = allocate(s.batch * d / 2, sizeof *s.rope_sin, what);
    s.scratch_size = max(max(widest, s.context), 2 * Q_BLOCK * d);
    s.scratch = allocate(threads * s.scratch_size, sizeof *s.scratch, what);
    s.paging = open_paging(m);
    return s;
}

// Chooses the size of the team after a pass that took `took` seconds.
static void adapt_team(struct Team *team, double took) {
    size_t smaller = max(1, team->size * 3 / 4), larger = min(team->all, team->size + 1);
    double *times = team->times, *time = &times[team->size], now = seconds();
    if (*time == 0)
        *time = took;
    times[smaller] *= 0.998; // after some hundred tokens it is tried again: another program may have ended meanwhile
    bool go_smaller = times[smaller] > 0 ? times[smaller] < 0.9 * *time : took > 1.05 * *time;
    *time = (*time + took) / 2;
    if (go_smaller || times[larger] < *time || now > team->next_try) { // an unknown time is 0, so it is tried at once
        team->size = go_smaller ? smaller : larger;
        team->next_try = now + 0.25;
    }
}

static void forward_parallel(const Model *m, RunState *s, const uint32_t *tokens, size_t T, size_t pos,
                             size_t n_logits) {
    double start = seconds();
    s->threads = T <= 1 + MAX_DRAFT ? s->team->size : s->team->all;
    // One thread does not enter a parallel region: outside of one, `omp for` is an ordinary loop, and inside, even one
    // thread would pay for a barrier after each loop.
    if (s->threads == 1)
        forward(m, s, tokens, T, pos, n_logits);
    else
#pragma omp parallel num_threads((int)s->threads)
        forward(m, s, tokens, T, pos, n_logits);
    if (s->adapt_threads && T == 1)
        adapt_team(s->team, seconds() - start);
    check_finite(m, s->logits, n_logits, pos + T - n_logits);
}

static float *thread_scratch(const RunState *s) { return s->scratch + (size_t)omp_get_thread_num() * s->scratch_size; }

// Writes a key and a value (d each) of kv head g at position pos into the KV cache, in 16 bits.
static void cache_kv(const Model *m, RunState *s, size_t layer, size_t g, size_t pos, const float *k, const float *v) {
    size_t d = m->h.head_dim;
    uint16_t k16[MAX_HEAD_DIM], v16[MAX_HEAD_DIM];
    convert_f32(k16, s->kv_type, k, d);
    convert_f32(v16, s->kv_type, v, d);
    for (size_t i = 0; i < d; i++) {
        s->k[k_index(m, s, layer, g, pos, i)] = k16[i];
        s->v[v_index(m, s, layer, g, pos, i)] = v16[i];
    }
}

static float cached_k(const Model *m, const RunState *s, size_t layer, size_t g, size_t pos, size_t i) {
    return load_number(s->k, s->kv_type, k_index(m, s, layer, g, pos, i));
}

static float cached_v(const Model *m, const RunState *s, size_t layer, size_t g, size_t pos, size_t i) {
    return load_number(s->v, s->kv_type, v_index(m, s, layer, g, pos, i));
}

// ---- Vectors of any length, with the vector extensions of gcc and clang

typedef uint32_t vec_u32 __attribute__((vector_size(4 * W)));
typedef float float4 __attribute__((vector_size(16)));

INLINE vec splat(uint32_t bits) { return (vec)(bits + (vec_u32){0}); } // a float, or a pair of bf16, in all lanes

INLINE vec load_f32(const void *p) {
    vec a;
    memcpy(&a, p, sizeof a);
    return a;
}

INLINE void store(float *p, vec a) { memcpy(p, &a, sizeof a); }

// Elements i, i + 1, ... of an array: W of them as f32, or with `pairs` 2W of them in bf16.
INLINE vec load(const void *array, Dtype dtype, bool pairs, size_t i) {
    const void *p = element_ptr(array, dtype, i);
    if (pairs || dtype == F32)
        return load_f32(p);
    if (dtype == BF16)
        return load_bf16(p);
    return load_f16(p);
}

// Forces a value into a register: otherwise gcc repeats a load in every multiplication, and clang 14 moves sums between
// registers and memory.
INLINE vec in_register(vec a) {
#if defined(__x86_64__)
    __asm__("" : "+v"(a));
#endif
    return a;
}

INLINE vec fma_or_bf16_dot(vec a, vec b, vec sum, bool pairs) {
    return pairs ? bf16_dot_vec(a, b, sum) : fma_vec(a, b, sum);
}

_Static_assert(MR == 4, "sum4 adds up four rows");
_Static_assert(CHAINS >= PAIR_CHAINS, "an array of CHAINS has room for either");

// out[0 to 3] = the sums over the lanes of four vectors, or += them
INLINE void store_sums4(float *out, vec a, vec b, vec c, vec d, Update update) {
    float4 sums = (float4)sum4(a, b, c, d), before = {0};
    if (update == ADD)
        memcpy(&before, out, sizeof before);
    sums += before;
    memcpy(out, &sums, sizeof sums);
}

// ---- The matrix product                                       (blocking as in BLIS: Van Zee and van de Geijn 2015)

// The cache lines that are prefetched while the micro-kernel works.
typedef struct {
    const char *next, *end;
    size_t lines; // at each step of the micro-kernel; for a large batch, before each group of rows
} Prefetch;

INLINE void prefetch_line(Prefetch *p) {
    if (p->next < p->end) {
        __builtin_prefetch(p->next, 0, 2); // 2: into L2, as L1 is full
        p->next += 64;
    }
}

// Multiplies `rows` rows of w, `apart` rows apart, by `group` tokens (rows of x), over all columns of x, which must
// fill whole vectors. Stores the sums of the first `tokens` tokens only: if there are fewer than `group`, the last one
// is computed several times. `rows`, `group` and the types are compile-time constants, so that all sums stay in
// registers; gcc needs the types as arguments of their own for that. AVX2 has 16 registers: 4 x 3 sums, 3 tokens, and a
// row.
INLINE void micro_kernel(float *out, size_t stride, Tensor w, Dtype w_type, size_t rows, size_t apart, Tensor x,
                         Dtype x_type, size_t group, size_t tokens, Update update, Prefetch *prefetch) {
    const bool pairs = w_type == BF16 && x_type == BF16;
    const size_t step = pairs ? 2 * W : W, chains = pairs ? PAIR_CHAINS : CHAINS;
    const size_t n = group == 1 ? chains : 1;                   // chains at a time
    const size_t most_lines = MR * step * size_of(w_type) / 64; // cache lines that a step reads
    vec sums[NR][MR], chain[NR][MR][CHAINS];
    for (size_t first = 0; first < chains; first += n) {
        for (size_t t = 0; t < group; t++)
            for (size_t r = 0; r < rows; r++)
                for (size_t j = 0; j < n; j++)
                    chain[t][r][j] = splat(0);
        for (size_t i = first * step; i < x.cols; i += chains * step)
            for (size_t j = 0; j < n && i + j * step < x.cols; j++) {
                vec token[NR];
                for (size_t t = 0; t < group; t++)
                    token[t] = in_register(load(x.data, x_type, pairs, min(t, tokens - 1) * x.stride + i + j * step));
                for (size_t r = 0; r < rows; r++) {
                    if (prefetch && r < most_lines && r < prefetch->lines) // the first test is done by the compiler
                        prefetch_line(prefetch);
                    size_t at = r * apart * w.stride + i + j * step;
                    if (group == 1 && (W < 16 || !pairs)) // else the CPU loads far enough ahead without prefetching
                        __builtin_prefetch((const char *)element_ptr(w.data, w_type, at) + PREFETCH_BYTES, 0,
                                           PREFETCH_LOCALITY);
                    vec row = load(w.data, w_type, pairs, at);
                    for (size_t t = 0; t < group; t++) {
                        chain[t][r][j] = fma_or_bf16_dot(row, token[t], chain[t][r][j], pairs);
                        if (W < 16 && group > 1) // the sums take nearly all registers
                            chain[t][r][j] = in_register(chain[t][r][j]);
                    }
                }
            }
        for (size_t t = 0; t < group; t++)
            for (size_t r = 0; r < rows; r++)
                for (size_t j = 0; j < n; j++)
                    sums[t][r] = first + j == 0 ? chain[t][r][0] : (vec)(sums[t][r] + chain[t][r][j]);
    }
    for (size_t t = 0; t < tokens; t++)
        if (rows == MR) {
            store_sums4(out + t * stride, sums[t][0], sums[t][1], sums[t][2], sums[t][3], update);
        } else {
            float sum[MR];
            store_sums4(sum, sums[t][0], rows > 1 ? sums[t][1] : splat(0), splat(0), splat(0), SET);
            for (size_t r = 0; r < rows; r++)
                out[t * stride + r * apart] = (update == ADD ? out[t * stride + r * apart] : 0) + sum[r];
        }
}

// For up to SMALL_BATCH tokens, the matrix product is limited by memory: each group of MR rows is multiplied by all
// tokens as soon as it arrives. Where at most FEW tokens are left, the micro-kernel computes about half as many sums.
enum { SMALL_BATCH = MR * NR, FEW = (NR + 1) / 2 };

// Multiplies whole groups of MR rows and whole vectors of columns by several tokens. A chunk of TOKENS_IN_L1 tokens
// stays in L1 while the rows of w stream past. Meanwhile it prefetches the rows that follow in memory, which are
// probably multiplied next. For a large batch, it prefetches some cache lines before each group of rows. For a small
// batch, the micro-kernel prefetches some at each step, because all of them at once were slower by a quarter.
INLINE void gemm_blocked(float *out, size_t stride, Tensor w, Dtype w_type, Tensor x, Dtype x_type, Update update,
                         bool large) {
    const size_t step = w_type == BF16 && x_type == BF16 ? 2 * W : W, chunk = KC_BYTES / size_of(x_type);
    size_t lines = MR * w.stride * size_of(w_type) / 64;                                         // in a group of rows
    size_t passes = (x.rows + TOKENS_IN_L1 - 1) / TOKENS_IN_L1 * ((x.cols + chunk - 1) / chunk); // over each group
    size_t steps = (x.rows + NR - 1) / NR * (x.cols / step); // of the micro-kernel for each group
    Prefetch prefetch = {element_ptr(w.data, w_type, w.rows * w.stride),
                         element_ptr(w.data, w_type, 2 * w.rows * w.stride),
                         large ? lines / passes + 1 : (lines + steps - 1) / steps};
    Prefetch *ahead = large ? NULL : &prefetch;
    for (size_t c = 0, n; c < x.cols; c += n) {
        n = min(chunk, x.cols - c);
        Update how = c ? ADD : update;
        for (size_t first = 0; first < x.rows; first += TOKENS_IN_L1)
            for (size_t r = 0; r < w.rows; r += MR) {
                size_t end = min(first + TOKENS_IN_L1, x.rows);
                for (size_t i = 0; large && i < prefetch.lines; i++)
                    prefetch_line(&prefetch);
                for (size_t t = first, tokens; t < end; t += tokens) {
                    tokens = min(NR, end - t);
                    Tensor rows = slice(w, r, MR, c, n), part = slice(x, t, tokens, c, n);
                    float *at = out + t * stride + r;
                    if (tokens > FEW)
                        micro_kernel(at, stride, rows, w_type, MR, 1, part, x_type, NR, tokens, how, ahead);
                    else
                        micro_kernel(at, stride, rows, w_type, MR, 1, part, x_type, FEW, tokens, how, ahead);
                }
            }
    }
}

// Completes a product of whole vectors, or of tiles: adds the columns from `cols` on to the first `rows` rows, and
// computes the other rows.
static void gemm_rest(float *out, size_t stride, Tensor w, Tensor x, size_t rows, size_t cols, Update update) {
    for (size_t r = 0; r < w.rows; r++) {
        size_t c = r < rows ? cols : 0;
        Tensor row = slice(w, r, 1, c, w.cols - c), tokens = slice(x, 0, x.rows, c, w.cols - c);
        for (size_t t = 0; t < x.rows && row.cols; t++) {
            float *at = out + t * stride + r;
            *at = (update == ADD || c ? *at : 0) + dot_ref(row, 0, tokens, t);
        }
    }
}

INLINE void gemm_typed(float *out, size_t stride, Tensor w, Dtype w_type, Tensor x, Dtype x_type, Update update) {
    w.dtype = w_type;
    x.dtype = x_type;
    size_t step = w_type == BF16 && x_type == BF16 ? 2 * W : W, cols = x.cols / step * step; // in whole vectors
    size_t chunk = KC_BYTES / size_of(x_type);
    size_t whole = x.rows > 1 && cols ? w.rows / MR * MR : 0; // rows in whole groups
    Tensor rows = slice(w, 0, whole, 0, cols), tokens = slice(x, 0, x.rows, 0, cols);
    if (whole && x.rows > SMALL_BATCH)
        gemm_blocked(out, stride, rows, w_type, tokens, x_type, update, true);
    else if (whole)
        gemm_blocked(out, stride, rows, w_type, tokens, x_type, update, false);
    // One token, or the rows that are left: two rows at a time, one from the first half and one from the second. Two
    // streams that are far apart get more memory bandwidth than one stream; two adjacent ones get less.
    size_t half = (w.rows - whole) / 2;
    for (size_t t = 0; t < x.rows; t++)
        for (size_t i = 0; i < w.rows - whole - half; i++) {
            size_t r = whole + (i < half ? i : 2 * half);
            for (size_t c = 0, n; c < cols; c += n) {
                n = min(chunk, cols - c);
                Tensor row = slice(w, r, 1, c, n), token = slice(x, t, 1, c, n);
                float *at = out + t * stride + r;
                if (i < half)
                    micro_kernel(at, stride, row, w_type, 2, half, token, x_type, 1, 1, c ? ADD : update, NULL);
                else
                    micro_kernel(at, stride, row, w_type, 1, 1, token, x_type, 1, 1, c ? ADD : update, NULL);
            }
        }
    gemm_rest(out, stride, w, x, w.rows, cols, update);
}

// out[t][r] = sum_c w[r][c] x[t][c], or += it; rows of out are `stride` apart
static void gemm(float *out, size_t stride, Tensor w, Tensor x, Update update) {
    if (x.dtype == BF16)
        gemm_typed(out, stride, w, BF16, x, BF16, update);
    else if (w.dtype == BF16)
        gemm_typed(out, stride, w, BF16, x, F32, update);
    else
        gemm_typed(out, stride, w, F16, x, F32, update);
}

#ifdef AMX

// AMX has eight tile registers of 16 rows of 64 bytes, and an instruction that multiplies two of them: A, 16 rows and
// 32 columns of weights, as they are in the file, and B, 16 pairs of columns of 16 tokens, as store_row has written
// them. It adds the products to a third tile of 16 x 16 sums, in the same order for each sum. A batch is padded to
// whole tiles; the sums of the padding are not used. So a token has the same bits alone as in a batch.

// Multiplies 32 rows of w, from row r on, by up to 32 tokens, from token t on, over the columns from c to end.
// Meanwhile it prefetches weights. A single pass over these rows prefetches two tiles ahead, in these rows and then in
// the next 32. Of several `passes`, each prefetches its share of the next 32 rows; this one is number `pass`.
static void amx_micro_kernel(float *out, size_t stride, Tensor w, size_t r, size_t c, size_t end, Tensor x, size_t t,
                             Update update, size_t pass, size_t passes) {
    const size_t tokens = min(AMX_BLOCK, x.rows - t), share = (AMX_BLOCK + passes - 1) / passes;
    const size_t distance = passes == 1 ? 2 * AMX_BLOCK : w.cols;
    const uint16_t *weights = (const uint16_t *)w.data + r * w.stride;
    const uint16_t *left = (const uint16_t *)x.data + t * x.stride, *right = left + 16 * x.stride; // 16 tokens each
    const long row = (long)(w.stride * sizeof *weights), sums_row = AMX_BLOCK * sizeof(float);
    float sums[AMX_BLOCK][AMX_BLOCK];
    __asm__ volatile("" : : : "memory"); // gcc does not know that tiles are loaded from memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (; c < end; c += AMX_BLOCK) {
        _tile_loadd(4, weights + c, row);
        _tile_loadd(5, weights + 16 * w.stride + c, row);
        _tile_loadd(6, left + c * 16, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        if (tokens > 16) {
            _tile_loadd(7, right + c * 16, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        size_t ahead = pass * share * w.stride + c + distance;
        if (c + distance >= w.cols) // goes on in the next 32 rows
            ahead += AMX_BLOCK * w.stride - w.cols;
        for (size_t i = 0; i < share; i++)
            __builtin_prefetch(weights + ahead + i * w.stride, 0, 3);
    }
    _tile_stored(0, sums[0], sums_row);
    _tile_stored(1, sums[16], sums_row);
    _tile_stored(2, sums[0] + 16, sums_row);
    _tile_stored(3, sums[16] + 16, sums_row);
    for (size_t j = 0; j < tokens; j++)
        for (size_t i = 0; i < AMX_BLOCK; i++) {
            float *at = out + (t + j) * stride + r + i;
            *at = (update == ADD ? *at : 0) + sums[i][j];
        }
}

// Up to 32 tokens: each block of 32 rows is read once, from the first column to the last. More tokens: a block of x
// stays in L2 while all rows of a thread are multiplied by it.
static void matmul_amx(RunState *s, float *out, size_t stride, Tensor w, Tensor x, Update update) {
    size_t block = AMX_BLOCK, cols = w.cols / AMX_BLOCK * AMX_BLOCK, end, passes;
    if (x.rows > AMX_BLOCK)
        block = max(AMX_BLOCK, round_up((w.rows + s->threads - 1) / s->threads, AMX_BLOCK));
    // All eight tiles of this thread are 16 rows of 64 bytes.
    static const struct {
        uint8_t palette, reserved[15];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } tiles = {1, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&tiles);
#pragma omp for schedule(static)
    for (size_t first = 0; first < w.rows; first += block) {
        Tensor part = slice(w, first, min(block, w.rows - first), 0, w.cols);
        size_t rows = part.rows / AMX_BLOCK * AMX_BLOCK;
        for (size_t start = 0; start < x.rows; start = end) {
            end = min(start + AMX_TOKENS, x.rows);
            passes = (end - start + AMX_BLOCK - 1) / AMX_BLOCK;
            for (size_t c = 0; c < cols; c += AMX_COLUMNS)
                for (size_t r = 0; r < rows; r += AMX_BLOCK)
                    for (size_t t = start; t < end; t += AMX_BLOCK)
                        amx_micro_kernel(out + first, stride, part, r, c, min(c + AMX_COLUMNS, cols), x, t,
                                         c ? ADD : update, (t - start) / AMX_BLOCK, passes);
        }
        gemm_rest(out + first, stride, part, x, rows, cols, update);
    }
    _tile_release();
}
#endif

// Returns the first of the rows that process p multiplies; a single process has all rows. AMX handles whole blocks of
// rows only, and gemm_rest, which adds in another order, the rest. So all parts but the last one consist of whole
// blocks, and the sums do not depend on the number of processes.
static size_t first_row(int p, size_t rows) {
    size_t blocks = (rows + AMX_BLOCK - 1) / AMX_BLOCK;
    return min(blocks * (size_t)p / (size_t)n_processes * AMX_BLOCK, rows);
}

// Splits the rows of w among the processes, and then among the threads. One token: each thread streams a range of rows.
// A small batch: each group of MR rows is multiplied by all tokens as soon as it arrives. A large batch: a block of MC
// rows stays in L2.
static void matmul_update(RunState *s, float *out, Tensor w, Tensor x, Update update) {
    if (!FAST) {
        matmul_ref(out, w, x, update);
        return;
    }
    size_t first = first_row(process, w.rows), rows = first_row(process + 1, w.rows) - first, block = MC;
    const Tensor own = slice(w, first, rows, 0, w.cols);
#pragma omp master
    page_weights(s->paging, own);
    if (x.rows == 1)
        block = max(1, (rows + s->threads - 1) / s->threads);
    else if (x.rows <= SMALL_BATCH)
        block = MR;
#ifdef AMX
    if (x.dtype == BF16_AMX)
        matmul_amx(s, out + first, w.rows, own, x, update);
    else
#endif
#pragma omp for schedule(static)
        for (size_t r = 0; r < rows; r += block)
            gemm(out + first + r, w.rows, slice(own, r, min(block, rows - r), 0, w.cols), x, update);
    gather_columns(out, x.rows, w.rows);
}

// ---- Attention

// y[c] += sum_j a[j] x[j][c] for a (m) f32 and x (m, n) f16; or for pairs of bf16 in both,
// y[c] += sum_j a[j][0] x[j][c][0] + a[j][1] x[j][c][1]. Does this for `queries` vectors y, which are y_stride floats
// apart, each with its own vector a, a_stride floats or pairs apart, and for `vectors` vectors of columns of x, from
// column `first` on. `queries` and `vectors` are compile-time constants.
INLINE void weighted_sum_fixed(float *y, size_t y_stride, const float *a, size_t a_stride, size_t queries,
                               const uint16_t *x, bool pairs, size_t m, size_t n, size_t first, size_t vectors) {
    const size_t P = pairs ? 2 : 1;
    vec sums[Q_TILE][NV];
    for (size_t q = 0; q < queries; q++)
        for (size_t c = 0; c < vectors; c++)
            sums[q][c] = load_f32(y + q * y_stride + first + c * W);
    for (size_t j = 0; j < m; j++) {
        vec row[NV];
        for (size_t c = 0; c < vectors; c++) {
            const uint16_t *at = x + (j * n + first + c * W) * P;
            row[c] = pairs ? load_f32(at) : load_f16(at);
            if (c * W * P % 32 == 0) // a cache line of the next block of keys or values
                __builtin_prefetch(at + m * n * P, 0, 2);
        }
        for (size_t q = 0; q < queries; q++) {
            uint32_t weight; // a float, or a pair of bf16
            memcpy(&weight, a + q * a_stride + j, sizeof weight);
            for (size_t c = 0; c < vectors; c++)
                sums[q][c] = fma_or_bf16_dot(splat(weight), row[c], sums[q][c], pairs);
        }
    }
    for (size_t q = 0; q < queries; q++)
        for (size_t c = 0; c < vectors; c++)
            store(y + q * y_stride + first + c * W, sums[q][c]);
}

INLINE void weighted_sum_typed(float *y, size_t y_stride, const float *a, size_t a_stride, size_t queries,
                               const uint16_t *x, bool pairs, size_t m, size_t n) {
    size_t c = 0;
    for (; c + NV * W <= n; c += NV * W)
        if (queries == Q_TILE)
            weighted_sum_fixed(y, y_stride, a, a_stride, Q_TILE, x, pairs, m, n, c, NV);
        else
            weighted_sum_fixed(y, y_stride, a, a_stride, 1, x, pairs, m, n, c, NV);
    for (; c < n; c += W) // the last columns, a vector at a time, of which the last one may be used in part
        for (size_t q = 0; q < queries; q++) {
            size_t size = min(W, n - c) * sizeof(float);
            float part[W] = {0};
            memcpy(part, y + q * y_stride + c, size);
            weighted_sum_fixed(part, W, a + q * a_stride, a_stride, 1, x + c * (pairs ? 2 : 1), pairs, m, n, 0, 1);
            memcpy(y + q * y_stride + c, part, size);
        }
}

// The weighted sums of rows that attention_block computes, for 1 or Q_TILE queries. May read up to a vector past the
// end of x. Inlined into forward, as gcc would do, its loop lacks registers: prefill of 4,096 was 4 % slower.
__attribute__((noinline)) static void weighted_sum(float *y, size_t y_stride, const float *a, size_t a_stride,
                                                   size_t queries, const uint16_t *x, bool pairs, size_t m, size_t n) {
    if (pairs)
        weighted_sum_typed(y, y_stride, a, a_stride, queries, x, true, m, n);
    else
        weighted_sum_typed(y, y_stride, a, a_stride, queries, x, false, m, n);
}

// One step of the online softmax: the scores of a block of keys become exp(score - max), and the running maximum and
// sum are updated. Returns the factor by which earlier partial results must be rescaled. Keys from n_visible on get no
// weight. If gcc inlines it, its last additions are not vector code: decode at position 1,000 was 4 % slower.
//                                                                                   (Milakov and Gimelshein 2018)
__attribute__((noinline)) static float online_softmax(float score[KV_BLOCK], size_t n_visible, float scale,
                                                      float *largest, float *sum) {
    // Tree reductions: the compiler can vectorise these, but not a sequential maximum or sum. They are unrolled,
    // because in a loop of unknown length each half would pass through memory.
    float fold[KV_BLOCK];
    for (size_t j = 0; j < KV_BLOCK; j++)
        fold[j] = score[j] = j < n_visible ? score[j] * scale : -INFINITY;
#pragma GCC unroll 6
    for (size_t half = KV_BLOCK / 2; half; half /= 2)
        for (size_t j = 0; j < half; j++)
            fold[j] = fold[j] > fold[j + half] ? fold[j] : fold[j + half];
    float new_largest = *largest > fold[0] ? *largest : fold[0];
    for (size_t j = 0; j < KV_BLOCK; j++)
        fold[j] = score[j] = exp_f32(score[j] - new_largest);
#pragma GCC unroll 6
    for (size_t half = KV_BLOCK / 2; half; half /= 2)
        for (size_t j = 0; j < half; j++)
            fold[j] += fold[j + half];
    float rescale = new_largest > *largest ? exp_f32(*largest - new_largest) : 1;
    *sum = *sum * rescale + fold[0];
    *largest = new_largest;
    return rescale;
}

// Attention for `count` queries that share kv head g, one block of keys and values after the other. Query `first` + i
// is that of head (first + i) % (H/G) of the group, of token (first + i) / (H/G) of the batch.
//                                                                                            (FlashAttention: Dao 2022)
static void attention_block(const Model *m, RunState *s, Tensor result, size_t layer, size_t pos, size_t g,
                            size_t first, size_t count) {
    const size_t d = m->h.head_dim, group = m->h.n_heads / m->h.n_kv_heads, P = pair_size(s);
    const bool pairs = P == 2; // then queries and weights are rounded to bf16, too
    const float scale = 1.0f / sqrtf((float)d);
    float *q = thread_scratch(s), *out = q + count * d; // (count, d) each: queries and output accumulators
    float largest[Q_BLOCK], sum[Q_BLOCK];
    memset(out, 0, count * d * sizeof *out);
    for (size_t i = 0; i < count; i++) {
        size_t t = (first + i) / group, head = g * group + (first + i) % group;
        const float *query = s->qkv + t * (m->q_dim + 2 * m->kv_dim) + head * d;
        convert_f32(q + i * d, pairs ? BF16 : F32, query, d);
        largest[i] = -INFINITY;
        sum[i] = 0;
    }
    size_t end = pos + (first + count - 1) / group + 1; // the last query looks at the most positions
    for (size_t start = 0; start < end; start += KV_BLOCK) {
        size_t block = kv_offset(m, s, layer, g, start);
        for (size_t i = 0, queries; i < count; i += queries) {
            queries = count - i >= Q_TILE ? Q_TILE : 1;
            float scores[Q_TILE][KV_BLOCK] = {0};
            uint16_t rounded[Q_TILE][KV_BLOCK]; // the same in bf16
            const void *weights = scores;
            // scores[j] = sum_c q[c] k[c][j]; slots past the last position hold garbage, which the softmax masks
            weighted_sum(scores[0], KV_BLOCK, q + i * d, d, queries, s->k + block, pairs, d / P, KV_BLOCK);
            size_t n_visible = 0; // grows from query to query, so that the last one's counts for all
            for (size_t j = 0; j < queries; j++) {
                size_t kv_len = pos + (first + i + j) / group + 1; // the positions that this query may look at
                n_visible = min(KV_BLOCK, max(kv_len, start) - start);
                float rescale = online_softmax(scores[j], n_visible, scale, &largest[i + j], &sum[i + j]);
                for (size_t c = 0; c < d && rescale != 1; c++)
                    out[(i + j) * d + c] *= rescale;
                if (pairs) {
                    convert_f32(rounded[j], BF16, scores[j], KV_BLOCK);
                    weights = rounded;
                }
            }
            weighted_sum(out + i * d, d, weights, KV_BLOCK / P, queries, s->v + block, pairs, (n_visible + P - 1) / P,
                         d);
        }
    }
    for (size_t i = 0; i < count; i++) {
        for (size_t c = 0; c < d; c++)
            out[i * d + c] /= sum[i];
        store_row(result, (first + i) / group, (g * group + (first + i) % group) * d, out + i * d, d);
    }
}

static void attention(const Model *m, RunState *s, Tensor out, size_t layer, size_t pos) {
    if (!FAST) {
        attention_ref(m, s, out, layer, pos);
        return;
    }
    size_t queries = out.rows * (m->h.n_heads / m->h.n_kv_heads); // that share a kv head
#pragma omp for collapse(2) schedule(dynamic)
    for (size_t g = 0; g < m->h.n_kv_heads; g++)
        for (size_t first = 0; first < queries; first += Q_BLOCK)
            attention_block(m, s, out, layer, pos, g, first, min(Q_BLOCK, queries - first));
}

// ---- Guesses

// Prompt lookup: copies what follows the latest earlier occurrence of the last 4 tokens, or else of the last 3 or 2.
static size_t draft(Session *s) {
    Context *c = &s->context;
    size_t n = c->tokens.n, room = min(c->max_tokens, s->run.context) - n; // with -n, the KV cache may be shorter
    size_t n_draft = min(min(s->options->draft, room), s->run.batch - 1);
    if (n_draft == 0 || c->n_past + 1 < n)
        return 0;
    reserve(&c->tokens, n_draft);
    uint32_t *tokens = c->tokens.data;
    size_t place = n, longest = 1; // where the tokens after the longest match so far start; its length, if above 1
    for (size_t i = n - 1; i > 0 && longest < 4; i--) {
        size_t same = 0;
        while (same < min(i, 4) && tokens[i - 1 - same] == tokens[n - 1 - same])
            same++;
        if (same > longest) {
            longest = same;
            place = i;
        }
    }
    if (longest == 1)
        return 0;
    for (size_t i = 0; i < n_draft; i++)
        tokens[n + i] = tokens[place + i]; // the last of these may be guesses themselves
    return n_draft;
}

// ------------------------------------------------------------------------------------------------
// 11 Larger than memory
//
// Each pass reads the file from front to back. If the file does not fit in memory, the system evicts the least recently
// used pages. These are always the ones that are needed next, so every pass would read the whole file from the disk. To
// avoid that, pieces of the file that were missing in two passes in a row are evicted right after use. The rest of the
// file stays in memory.

enum { PIECE_BYTES = 16 << 20, PIECES_AHEAD = 2, MIN_PAGE = 4096 };

struct Paging {
    const Model *m;
    size_t at;         // where in the file this pass is
    long major_faults; // major page faults (that read from the disk) before this pass; LONG_MAX at first
    bool active;       // there were major page faults in the previous pass
    size_t n_checked;  // pieces that have been checked for being in memory in this pass
    size_t n_used;     // pieces that have been used in this pass
    uint8_t *misses;   // (pieces)  in how many passes in a row a piece was missing from memory, at most 2
    size_t keep;       // the first piece that was missing in this pass; it stays, to find out if there is room again
};

#ifdef __linux__
// Finds out whether at least half of a piece is in memory.
static void check_resident(Paging *p, size_t piece) {
    unsigned char pages[PIECE_BYTES / MIN_PAGE];
    size_t start = piece * PIECE_BYTES, size = min(PIECE_BYTES, p->m->file.size - start);
    size_t n = size / (size_t)sysconf(_SC_PAGESIZE), found = 0;
    bool known = !mincore(p->m->file.bytes + start, size, pages);
    for (size_t i = 0; i < n && known; i++)
        found += pages[i] & 1;
    bool missing = known && found < n / 2;
    p->misses[piece] = missing ? (uint8_t)min(2, p->misses[piece] + 1u) : 0;
    if (missing && p->keep == SIZE_MAX)
        p->keep = piece;
}

static void evict(const Paging *p, size_t piece) {
    size_t start = piece * PIECE_BYTES, size = min(PIECE_BYTES, p->m->file.size - start);
    if (p->misses[piece] == 2 && piece != p->keep) {
        madvise(p->m->file.bytes + start, size, MADV_DONTNEED);                       // from this process,
        posix_fadvise(p->m->file.fd, (off_t)start, (off_t)size, POSIX_FADV_DONTNEED); // and from the system's cache
    }
}

// Called by one thread before the matrix w is used: checks the pieces that are needed next, and evicts used ones.
static void page_weights(Paging *p, Tensor w) {
    if (!p)
        return;
    size_t start = (size_t)((unsigned char *)w.data - p->m->file.bytes), size = w.rows * w.cols * sizeof(uint16_t);
    if (start < p->at) { // another pass begins: in a tied model with the classifier, as it is the embedding
        while (p->n_used < p->n_checked)
            evict(p, p->n_used++);
        struct rusage usage;
        getrusage(RUSAGE_SELF, &usage);
        p->active = usage.ru_majflt > p->major_faults;
        p->major_faults = usage.ru_majflt;
        p->n_used = p->n_checked = start / PIECE_BYTES;
        p->keep = SIZE_MAX;
    }
    p->at = start;
    // Checks a piece before the system's readahead loads it. Of several processes, each checks only its own rows.
    size_t end = min(start + size + (n_processes > 1 ? 0 : PIECES_AHEAD * PIECE_BYTES), p->m->file.size);
    p->n_checked = max(p->n_checked, start / PIECE_BYTES);
    while (p->active && p->n_checked * PIECE_BYTES < end)
        check_resident(p, p->n_checked++);
    while (p->active && (p->n_used + 1) * PIECE_BYTES <= start)
        evict(p, p->n_used++);
}

static Paging *open_paging(const Model *m) {
    if (m->file.size <= PIECE_BYTES)
        return NULL;
    size_t pieces = m->file.size / PIECE_BYTES + 1;
    Paging *p = allocate(1, sizeof *p, "paging");
    *p = (Paging){.m = m, .at = m->file.size, .major_faults = LONG_MAX, .misses = allocate(pieces, 1, "paging")};
    memset(p->misses, 0, pieces);
    return p;
}
#else
static void page_weights(Paging *p, Tensor w) { (void)p, (void)w; }
static Paging *open_paging(const Model *m) { return (void)m, NULL; }
#endif

// ------------------------------------------------------------------------------------------------
// 12 Several machines
//
// `make mpi` builds a program for several processes, usually one on each machine. mpirun starts it on all of them. Each
// process multiplies a part of the rows of every matrix, so it needs only this part of the weights file in memory.
// After each product, the processes exchange their parts of the result with MPI. All of them compute everything else,
// so at any time they have the same numbers, which are those of a single process, bit for bit. Process 0 reads the
// input for all, and prints.

// Exits if process 0 has other data. Compares the first 64 KB of each of 256 parts, because a machine may not have
// enough memory for all weights.
static void expect_same(const char *what, const void *data, size_t size) {
    uint64_t hash = size;
    for (size_t start = 0; n_processes > 1 && start < size; start += max(1 << 16, size / 256))
        for (size_t i = start; i < min(start + (1 << 16), size); i++)
            hash = hash * 31 + ((const unsigned char *)data)[i];
    uint64_t first = hash;
    share(&first, sizeof first);
    expect(hash == first, "%s: expected the same as in process 0, found a difference", what);
}

#ifdef MPI
#include <mpi.h>

// Completes out (T, n), of which each process has computed some columns. All of them send at the same time.
static void gather_columns(float *out, size_t T, size_t n) {
#pragma omp single
    {
        MPI_Request requests[n_processes];
        for (int p = 0; p < n_processes; p++) {
            size_t first = first_row(p, n), end = first_row(p + 1, n);
            MPI_Datatype columns; // T times end - first numbers, n apart
            MPI_Type_vector((int)T, (int)(end - first), (int)n, MPI_FLOAT, &columns);
            MPI_Type_commit(&columns);
            MPI_Ibcast(out + first, 1, columns, p, MPI_COMM_WORLD, &requests[p]);
            MPI_Type_free(&columns);
        }
        MPI_Waitall(n_processes, requests, MPI_STATUSES_IGNORE);
    }
}

static void share(void *data, size_t size) { MPI_Bcast(data, (int)size, MPI_BYTE, 0, MPI_COMM_WORLD); }

static void end_processes(void) {
    if (exit_status)
        MPI_Abort(MPI_COMM_WORLD, exit_status);
    MPI_Finalize();
}

static void start_processes(int argc, char **argv) {
    MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &(int){0}); // one thread at a time calls MPI
    MPI_Comm_rank(MPI_COMM_WORLD, &process);
    MPI_Comm_size(MPI_COMM_WORLD, &n_processes);
    atexit(end_processes);
    if (process) { // prints nothing but the message of die
        error_fd = dup(STDERR_FILENO);
        (void)!freopen("/dev/null", "w", stdout);
        dup2(STDOUT_FILENO, STDERR_FILENO);
    }
    expect_same("build", VERSION __VERSION__, sizeof VERSION __VERSION__);
    expect_same("build", isa(), strlen(isa()));
    expect_same("flags", &argc, sizeof argc);
    for (int i = 1; i < argc; i++)
        expect_same("flags", argv[i], strlen(argv[i]));
}
#else
static void start_processes(int argc, char **argv) { (void)argc, (void)argv; }
static void share(void *data, size_t size) { (void)data, (void)size; }
static void gather_columns(float *out, size_t T, size_t n) { (void)out, (void)T, (void)n; }
#endif

// ------------------------------------------------------------------------------------------------

#ifndef NO_MAIN // the tests include this file and have their own main
// Opens the files that the command line names, and runs the mode.
int main(int argc, char **argv) {
    prepare_process(argv);
    start_processes(argc, argv);
    Options o = parse_options(argc, argv);
    const Mode *mode = find_mode(o.mode);
    if (!o.model && !(mode->run == tokenize && o.tokenizer)) // tokenize needs no model
        o.model = DEFAULT_MODEL;
    Session s = {.options = &o, .printer = new_printer(&o)};
    if (o.model) {
        s.model = open_model(o.model);
        uint32_t longest = s.model.h.max_seq_len;
        s.context.max_tokens = o.context ? o.context : longest;
        expect_usage(s.context.max_tokens <= longest, "-c: expected at most %u, the context of %s, found %zu", longest,
                     o.model, s.context.max_tokens);
        o.adapt_threads = o.threads == 0;
        o.threads = min(o.adapt_threads ? default_threads() : o.threads, max_useful_threads(&s.model));
    }
    s.tokenizer = open_tokenizer(tokenizer_path(&o));
    const TokenizerHeader *t = &s.tokenizer->h;
    expect(!o.model || (s.model.h.vocab_size == t->vocab_size && s.model.h.vocab_hash == t->vocab_hash),
           "%s: the wrong tokenizer for %s (-z names another): expected %u tokens with the hash %016llx, found %u with "
           "%016llx",
           s.tokenizer->file.path, o.model, s.model.h.vocab_size, (unsigned long long)s.model.h.vocab_hash,
           t->vocab_size, (unsigned long long)t->vocab_hash);
    expect_same("weights file", s.model.file.bytes, s.model.file.size);
    expect_same("tokenizer file", s.tokenizer->file.bytes, s.tokenizer->file.size);
    share(&o.seed, sizeof o.seed);
    mode->run(&s);
    flush_output();
    exit(0); // not return: the memory that s refers to stays reachable for leak checkers
}
#endif
