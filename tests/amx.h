/* AMX in plain C, for processors that multiply pairs of bf16 but have no tiles: gcc -include tests/amx.h. The sums are
 * those of Intel's manual (Software Developer's Manual, TDPBF16PS), in that order. */
#define _GNU_SOURCE
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

// All tiles are of 16 rows of 64 bytes, as run.c wants them.
static _Thread_local union {
    float sums[16][16];
    uint32_t pairs[16][16];
} amx_tiles[8];

static inline void amx_load(int tile, const void *from, long stride) {
    for (int i = 0; i < 16; i++)
        memcpy(amx_tiles[tile].pairs[i], (const char *)from + i * stride, 64);
}

static inline void amx_store(int tile, void *to, long stride) {
    for (int i = 0; i < 16; i++)
        memcpy((char *)to + i * stride, amx_tiles[tile].pairs[i], 64);
}

// One row m of sums: sums[m][n] += sum_k a[m][k] . b[k][n], where all products of the pairs' first parts are added up,
// and all of their second parts, and then both. A function of its own, or it could be reckoned in another mode.
static __attribute__((noinline)) void amx_multiply_row(float *sums, const uint32_t *a, const uint32_t b[16][16]) {
    for (int n = 0; n < 16; n++) {
        float first = 0, second = 0;
        for (int k = 0; k < 16; k++) {
            const uint32_t bits[4] = {a[k] << 16, b[k][n] << 16, a[k] & 0xffff0000, b[k][n] & 0xffff0000};
            float parts[4];
            memcpy(parts, bits, sizeof parts);
            first = fmaf(parts[0], parts[1], first);
            second = fmaf(parts[2], parts[3], second);
        }
        sums[n] += first + second;
    }
}

static inline void amx_multiply(int sums, int a, int b) {
    unsigned mode = _mm_getcsr();
    _mm_setcsr(0x9fc0); // rounds to nearest; what is below 2^-126 counts as 0, read or made
    for (int m = 0; m < 16; m++)
        amx_multiply_row(amx_tiles[sums].sums[m], amx_tiles[a].pairs[m], amx_tiles[b].pairs);
    _mm_setcsr(mode);
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(shapes) ((void)(shapes), memset(amx_tiles, 0, sizeof amx_tiles))
#define _tile_release() ((void)0)
#define _tile_zero(tile) memset(&amx_tiles[tile], 0, sizeof amx_tiles[tile])
#define _tile_loadd(tile, from, stride) amx_load(tile, from, stride)
#define _tile_stored(tile, to, stride) amx_store(tile, to, stride)
#define _tile_dpbf16ps(sums, a, b) amx_multiply(sums, a, b)
#define syscall(...) 0 // Linux need not be asked for tiles
