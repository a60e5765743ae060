/* How near run comes to the limits of the machine. It does the work of `run -m bench`, takes the same options, and
 * measures beside each work what limits it: a prompt the peak of the multiply instruction, and generation the best
 * plain read of the weights file. Limits change from minute to minute on many machines, so each is measured before and
 * after each pass of the work.
 *
 *     build/roofline-native [MODEL] [options]        `make bench` runs it on models of six sizes
 */
#define NO_MAIN
#include "../run.c"

// Bytes per second of a plain read of the whole weights file: generation reads nearly all of it for each token.
static double read_bandwidth(const Session *s) {
    const uint64_t *words = (const void *)s->model.file.bytes;
    uint64_t sum = 0;
    double start = seconds();
#pragma omp parallel for num_threads((int)s->options->threads) reduction(+ : sum)
    for (size_t i = 0; i < s->model.file.size / sizeof *words; i++)
        sum += words[i];
    __asm__ volatile("" : : "r"(sum)); // or the compiler would leave out the loop
    return (double)s->model.file.size / (seconds() - start);
}

// Multiplies in registers only, with as many sums as the micro-kernel has. Returns the number of operations.
INLINE double multiply_registers(bool pairs, size_t rounds) {
    vec sums[NR][MR], factor = in_register(splat(0));
    for (size_t t = 0; t < NR; t++)
        for (size_t r = 0; r < MR; r++)
            sums[t][r] = in_register(splat(0));
    for (size_t i = 0; i < rounds; i++)
        for (size_t t = 0; t < NR; t++)
            for (size_t r = 0; r < MR; r++)
                sums[t][r] = fma_or_bf16_dot(factor, factor, sums[t][r], pairs);
    volatile vec used; // or the compiler would leave out the loop
    for (size_t t = 0; t < NR; t++)
        for (size_t r = 0; r < MR; r++)
            used = sums[t][r];
    (void)used;
    return (double)rounds * NR * MR * W * (pairs ? 4 : 2);
}

#ifdef AMX
// The same with tiles: four of 16 x 16 sums, each made of 16 pairs of products, as amx_micro_kernel has them.
static double multiply_tiles(size_t rounds) {
    static const struct {
        uint8_t palette, reserved[15];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } tiles = {1, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    _tile_loadconfig(&tiles); // constant: gcc does not know that all of it is read
    for (size_t i = 0; i < rounds; i++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 5, 6);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return (double)rounds * 4 * 16 * 16 * 16 * 4;
}
#else
static double multiply_tiles(size_t rounds) { return (double)rounds; } // is never called
#endif

// The same with the instruction that a prompt's matrix products are made of.
static double multiply_only(Dtype xb_type, size_t rounds) {
    if (xb_type == BF16_AMX)
        return multiply_tiles(rounds);
    if (xb_type == BF16)
        return multiply_registers(true, rounds);
    return multiply_registers(false, rounds);
}

// Floating-point operations per second of that instruction.
static double peak_flops(const Session *s) {
    double operations = 0, start = seconds();
#pragma omp parallel num_threads((int)s->options->threads) reduction(+ : operations)
    operations += multiply_only(s->run.xb_type, 400000);
    return operations / (seconds() - start);
}

// The limits of a work, and how near it came to them: once for each repetition.
typedef struct {
    double limit[MAX_REPEAT], ratio[MAX_REPEAT];
} Roof;

static double limit_of(const Session *s, bool reads) { return reads ? read_bandwidth(s) : peak_flops(s); }

static void measure(Session *s, Work *w, Roof *roof, size_t i, bool reads) {
    double limits = limit_of(s, reads), n_limits = 1, working = 0;
    for (size_t t = 0; t < w->tokens; t += w->step) {
        double start = seconds();
        eval_range(s, w->pos + t, w->step);
        working += seconds() - start;
        limits += limit_of(s, reads);
        n_limits++;
    }
    w->tok_s[i] = (double)w->tokens / working;
    roof->limit[i] = limits / n_limits;
    roof->ratio[i] = w->tok_s[i] * w->work / roof->limit[i];
}

static void print_row(Work *w, Roof *roof, size_t n, bool reads, bool json) {
    double *samples[] = {w->tok_s, roof->limit, roof->ratio};
    for (size_t i = 0; i < 3; i++)
        qsort(samples[i], n, sizeof(double), ascending);
    double tok_s = w->tok_s[n / 2], rate = tok_s * w->work / 1e9, limit = roof->limit[n / 2] / 1e9;
    if (json)
        printf(", \"%s\": {\"tokens\": %zu, \"position\": %zu, \"tok_s\": %.6g, \"tok_s_min\": %.6g, "
               "\"tok_s_max\": %.6g, \"%s\": %.6g, \"%s\": %.6g, \"ratio\": %.4f}",
               w->name, w->tokens, w->pos, tok_s, w->tok_s[0], w->tok_s[n - 1], w->rate, rate,
               reads ? "read_gb_s" : "peak_gflops", limit, roof->ratio[n / 2]);
    else
        printf("| %-13s | %6zu | %8zu | %9.2f | %9.2f | %9.2f | %-6s %7.1f | %-6s %7.1f | %5.2f |\n", w->name,
               w->tokens, w->pos, tok_s, w->tok_s[0], w->tok_s[n - 1], reads ? "GB/s" : "GFLOPS", rate,
               reads ? "GB/s" : "GFLOPS", limit, roof->ratio[n / 2]);
}

int main(int argc, char **argv) {
#if defined(_OPENMP) && defined(__linux__)
    // As run does: OpenMP's threads shall not wait for long by spinning.
    if (!getenv("GOMP_SPINCOUNT") && !getenv("OMP_WAIT_POLICY") && !setenv("GOMP_SPINCOUNT", "3000", 1))
        execv("/proc/self/exe", argv);
#endif
    Options o = parse_options(argc, argv);
    Session s = {.options = &o, .model = open_model(o.model ? o.model : DEFAULT_MODEL)};
    const Model *m = &s.model;
    s.context.max_tokens = o.context ? o.context : m->h.max_seq_len;
    if (s.context.max_tokens > m->h.max_seq_len)
        die(EXIT_USAGE, "-c: expected at most %u, the context of %s, found %zu", m->h.max_seq_len, m->file.path,
            s.context.max_tokens);
    o.adapt_threads = o.threads == 0;
    o.threads = min(o.adapt_threads ? default_threads() : o.threads, max_useful_threads(m));
    Work works[N_WORKS];
    static Roof roofs[N_WORKS];
    prepare_bench(&s, works);
    read_bandwidth(&s); // loads the weights into memory
    eval_range(&s, 0, 1);
    for (size_t i = 0; i < o.repeat; i++)
        for (size_t w = 0; w < N_WORKS; w++)
            measure(&s, &works[w], &roofs[w], i, w != PREFILL);

    uint64_t hash = hash_of(s.run.logits, m->h.vocab_size * sizeof(float));
    fputs(o.json ? "{\"model\": " : "", stdout);
    print_quoted(span_of(m->file.path), PRINT_JSON);
    printf(o.json ? ", \"params\": %zu, \"dtype\": \"%s\", \"file_bytes\": %zu, \"isa\": \"%s\", \"threads\": %zu, "
                    "\"context\": %zu, \"repeat\": %zu, \"logits_hash\": \"%016llx\""
                  : ": %zu parameters in %s, %zu bytes; %s; threads: %zu; context: %zu; median of %zu; logits "
                    "%016llx\n\n"
                    "| work          | tokens | position |     tok/s |       min |       max |           rate |"
                    "          limit | share |\n"
                    "|---------------|-------:|---------:|----------:|----------:|----------:|---------------:|"
                    "---------------:|------:|\n",
           n_params(m), dtype_name(m), m->file.size, isa(), (size_t)o.threads, s.context.max_tokens, (size_t)o.repeat,
           (unsigned long long)hash);
    for (size_t w = 0; w < N_WORKS; w++)
        print_row(&works[w], &roofs[w], o.repeat, w != PREFILL, o.json);
    fputs(o.json ? "}\n" : "", stdout);
    flush_output();
    return 0;
}
