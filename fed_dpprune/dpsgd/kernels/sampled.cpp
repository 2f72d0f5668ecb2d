// Per-example gradients on a support. Layout rule of the whole file: LANES examples side by side ("a group"), so that one
// vector instruction works on LANES examples at one position and no sum across a vector is ever needed inside a layer.
//
// Every loop over threads writes to places of its own, and each value is summed in an order that does not depend on the
// number of threads: results are bit-identical for any number of them. No lane looks at another: what is computed for an
// example does not depend on its place or its neighbours. Squares, norms and sums over examples are in float64, where
// squares of float32 are exact and products of four of them stay in range; only the gradients of a sliding product are float32,
// and their norms and sums read the same stored numbers.

#include <algorithm>
#include <cfenv>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t bits __attribute__((vector_size(LANES * 4), may_alias));
// Half the lanes in float64: HALVES of them are as many lanes as one vec.
constexpr int HALF = LANES / 2, HALVES = 2;
typedef double half __attribute__((vector_size(HALF * 8)));
typedef double loose_half __attribute__((vector_size(HALF * 8), aligned(8)));
typedef float narrow __attribute__((vector_size(HALF * 4), aligned(4), may_alias));

namespace {

inline vec load(const float *p) { return *reinterpret_cast<const loose *>(p); }

inline half widen(const float *p) {  // one instruction where the compiler would not find it
#if defined(__AVX512F__)
    return (half)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif defined(__AVX__)
    return (half)_mm256_cvtps_pd(_mm_loadu_ps(p));
#else
    return __builtin_convertvector(*reinterpret_cast<const narrow *>(p), half);
#endif
}
inline half load(const double *p) { return *reinterpret_cast<const loose_half *>(p); }
inline void store(double *p, half v) { *reinterpret_cast<loose_half *>(p) = v; }

inline float across(vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#else
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
#endif
}

inline double across(half v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_pd(v);
#else
    double total = 0;
    for (int i = 0; i < HALF; i++) total += v[i];
    return total;
#endif
}

struct Squares {  // float64 sums of squares, one a lane
    half total[HALVES] = {};
    void add(vec v) {
        alignas(64) float lane[LANES];
        *reinterpret_cast<vec *>(lane) = v;
        for (int h = 0; h < HALVES; h++) {
            const half x = widen(lane + h * HALF);
            total[h] += x * x;
        }
    }
    void write(double *out) const {
        for (int h = 0; h < HALVES; h++) store(out + h * HALF, total[h]);
    }
};

// Rounding to nearest, denormals kept: a library loaded by somebody else may have set this thread otherwise.
inline void pin() { std::fesetenv(FE_DFL_ENV); }

struct Buffer {  // one thread's scratch, aligned for vectors, kept between calls
    void *memory = nullptr;
    size_t size = 0;
    vec *take(size_t vectors) {
        size_t bytes = vectors * sizeof(vec);
        if (bytes > size) {
            free(memory);
            memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
            size = memory ? bytes : 0;
        }
        return static_cast<vec *>(memory);
    }
    ~Buffer() { free(memory); }
};
thread_local Buffer scratch;
int threads = 1;

#if defined(__AVX512F__)
inline void transpose(__m512 r[16]) {
    __m512 t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        auto d = [&](int k) { return _mm512_castps_pd(t[4 * i + k]); };
        r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(d(0), d(2)));
        r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(d(0), d(2)));
        r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(d(1), d(3)));
        r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(d(1), d(3)));
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    }
}
#endif

// Rows of `count` consecutive floats of LANES examples (stride `example`), turned so that examples lie side by side.
// `place(i, v)` receives position i. Lanes from `valid` on are zero. `ahead`: where the next row of interest lies.
template <class Place>
inline void turn(const float *source, int64_t example, int valid, int64_t count, int64_t ahead, Place place) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i < count; i += 16) {
        __m512 r[16];
        int64_t left = count - i;
        __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
        for (int n = 0; n < 16; n++) {
            r[n] = n < valid ? _mm512_maskz_loadu_ps(mask, source + n * example + i) : _mm512_setzero_ps();
            __builtin_prefetch(source + n * example + i + ahead);
        }
        transpose(r);
        if (left >= 16) {
            for (int k = 0; k < 16; k++) place(i + k, (vec)r[k]);
        } else {
            for (int k = 0; k < left; k++) place(i + k, (vec)r[k]);
        }
    }
#else
    for (; i < count; i++) {
        vec v = {};
        for (int n = 0; n < valid; n++) v[n] = source[n * example + i];
        place(i, v);
    }
#endif
}

struct Plane {  // where a stack of channel planes lies, in floats
    int64_t example, channel, row, column;
};

// Rows [low, high) of the wanted channels of LANES examples -> target[slot][(y - low + top) * pitch + x + left].
// Optionally adds up each channel (the gradient of a bias).
void pack(const float *source, Plane at, int valid, int64_t width, int64_t low, int64_t high, const std::vector<int32_t> &wanted,
          vec *target, int64_t plane, int64_t pitch, int64_t top, int64_t left, vec *sums) {
    int64_t slots = static_cast<int64_t>(wanted.size());
    if (at.channel == 1 && at.column != 1) {  // channels last: turn blocks of neighbouring channels, position by position
        for (int64_t y = low; y < high; y++) {
            for (int64_t x = 0; x < width; x++) {
                vec *spot = target + (y - low + top) * pitch + x + left;
                const float *from = source + y * at.row + x * at.column;
                for (int64_t s = 0; s < slots;) {
                    int64_t e = s + 1;
                    while (e < slots && wanted[e] == wanted[e - 1] + 1) e++;
                    turn(from + wanted[s], at.example, valid, e - s, at.column, [&](int64_t i, vec v) {
                        spot[(s + i) * plane] = v;
                        if (sums) sums[s + i] += v;
                    });
                    s = e;
                }
            }
        }
        return;
    }
    for (int64_t s = 0; s < slots; s++) {
        const float *from = source + wanted[s] * at.channel + low * at.row;
        vec *spot = target + s * plane + top * pitch + left;
        vec total = {};
        if (at.column == 1 && at.row == width && pitch == width) {
            turn(from, at.example, valid, (high - low) * width, at.channel, [&](int64_t i, vec v) {
                spot[i] = v;
                total += v;
            });
        } else if (at.column == 1 && at.row == width) {
            int64_t x = 0, to = 0;
            turn(from, at.example, valid, (high - low) * width, at.channel, [&](int64_t, vec v) {
                spot[to + x] = v;
                total += v;
                if (++x == width) x = 0, to += pitch;
            });
        } else {
            for (int64_t y = 0; y < high - low; y++) {
                for (int64_t x = 0; x < width; x++) {
                    vec v = {};
                    for (int n = 0; n < valid; n++) v[n] = from[n * at.example + y * at.row + x * at.column];
                    spot[y * pitch + x] = v;
                    total += v;
                }
            }
        }
        if (sums) sums[s] += total;
    }
}

struct Walk {  // how both operands move over the output positions of a tile
    int64_t rows, width, a_row, a_step;
};

// OB output channels against CB weights each: the sums over positions of b * a, LANES examples at once.
template <int OB, int CB, bool UNIT>
inline void block(const vec *const *b, const vec *const *a, Walk walk, vec *out) {
    vec sum[OB][CB];
    for (int q = 0; q < OB; q++)
        for (int p = 0; p < CB; p++) sum[q][p] = vec{};
    const int64_t step = UNIT ? 1 : walk.a_step;
    for (int64_t y = 0; y < walk.rows; y++) {
        const vec *br[OB], *ar[CB];
        for (int q = 0; q < OB; q++) br[q] = b[q] + y * walk.width;
        for (int p = 0; p < CB; p++) ar[p] = a[p] + y * walk.a_row;
        for (int64_t x = 0; x < walk.width; x++) {
            vec bv[OB];
            for (int q = 0; q < OB; q++) bv[q] = br[q][x];
            for (int p = 0; p < CB; p++) {
                vec av = ar[p][x * step];
                for (int q = 0; q < OB; q++) sum[q][p] += bv[q] * av;
            }
        }
    }
    for (int q = 0; q < OB; q++)
        for (int p = 0; p < CB; p++) out[q * CB + p] = sum[q][p];
}

typedef void (*Block)(const vec *const *, const vec *const *, Walk, vec *);
constexpr int WIDE = 8;   // weights against one output channel
constexpr int ROWS = 4;   // output channels of a dense block
constexpr int COLUMNS = 6;  // weights of a dense block: ROWS * COLUMNS sums and the operands fit the vector registers

template <bool UNIT> struct Blocks {
    Block one[WIDE + 1] = {nullptr, block<1, 1, UNIT>, block<1, 2, UNIT>, block<1, 3, UNIT>, block<1, 4, UNIT>,
                           block<1, 5, UNIT>, block<1, 6, UNIT>, block<1, 7, UNIT>, block<1, 8, UNIT>};
    Block dense[COLUMNS + 1] = {nullptr, block<ROWS, 1, UNIT>, block<ROWS, 2, UNIT>, block<ROWS, 3, UNIT>,
                                block<ROWS, 4, UNIT>, block<ROWS, 5, UNIT>, block<ROWS, 6, UNIT>};
};
const Blocks<true> unit_blocks;
const Blocks<false> stepping_blocks;

struct Shape {
    int64_t n, c, h, w, o, ho, wo, kh, kw, sh, sw, ph, pw, dh, dw, groups;
    Plane a, b;
    int64_t tile_bytes, channel_bytes;
};

}  // namespace

extern "C" {

int64_t lanes() { return LANES; }
void use_threads(int64_t count) { threads = static_cast<int>(count); }

// Live weight gradients of a convolution, example by example.
//   shape       the numbers of struct Shape, in its order
//   a, b        layer input and gradient of the layer output
//   row_starts  (o + 1): the live weights of output channel r are row_starts[r] .. row_starts[r + 1]
//   columns     position of each live weight inside its row: (channel * kh + i) * kw + j
//   product     not 0: all rows with live weights have the same columns
//   values      (groups of examples, live, LANES)
//   bias        (groups of examples, rows with wanted[r], LANES), or null
//   wanted_bias (o), whether the bias of r is wanted (null with bias)
//   squared     (2, groups of examples * LANES): sum of squares over the live weights; over the biases, if wanted
// Returns 0, or 1 when memory ran out.
int conv_values(const int64_t *numbers, const float *a, const float *b, const int64_t *row_starts, const int32_t *columns,
                int product, float *values, float *bias, const uint8_t *wanted_bias, double *squared) {
    Shape s;
    std::memcpy(&s, numbers, sizeof(Shape));
    const int64_t live = row_starts[s.o], kernel = s.kh * s.kw, in_group = s.c / s.groups, out_group = s.o / s.groups;
    const int64_t pitch = std::max((s.wo - 1) * s.sw + (s.kw - 1) * s.dw + 1, s.pw + s.w);

    std::vector<int32_t> outputs, inputs, slot_of(s.c, -1);
    std::vector<int64_t> bias_at;
    int64_t biases = 0;
    for (int64_t r = 0; r < s.o; r++) {
        bool wants = bias && wanted_bias[r];
        if (row_starts[r] == row_starts[r + 1] && !wants) continue;
        outputs.push_back(static_cast<int32_t>(r));
        bias_at.push_back(wants ? biases++ : -1);
        for (int64_t k = row_starts[r]; k < row_starts[r + 1]; k++) slot_of[r / out_group * in_group + columns[k] / kernel] = 0;
    }
    for (int64_t c = 0; c < s.c; c++)
        if (slot_of[c] == 0) slot_of[c] = static_cast<int32_t>(inputs.size()), inputs.push_back(static_cast<int32_t>(c));

    // A tile is a band of output rows, small enough for both operands to stay in the second-level cache.
    auto band = [&](int64_t rows) { return (rows - 1) * s.sh + (s.kh - 1) * s.dh + 1; };
    const int64_t a_count = static_cast<int64_t>(inputs.size()), b_count = static_cast<int64_t>(outputs.size());
    int64_t rows = s.ho;
    while (rows > 1 && (a_count * band(rows) * pitch + b_count * rows * s.wo) * static_cast<int64_t>(sizeof(vec)) > s.tile_bytes)
        rows = (rows + 1) / 2;
    const int64_t a_plane = band(rows) * pitch, b_plane = rows * s.wo;

    // Inside a tile, channels go in blocks that stay closer still.
    int64_t channels = std::max<int64_t>(1, s.channel_bytes / (a_plane * static_cast<int64_t>(sizeof(vec))));
    if (s.groups > 1) channels = s.c;
    const int64_t blocks = (in_group + channels - 1) / channels;
    std::vector<int64_t> offsets(live), cuts(b_count * (blocks + 1));
    for (int64_t i = 0; i < b_count; i++) {
        int64_t r = outputs[i], k = row_starts[r];
        for (int64_t block = 0; block <= blocks; block++) {
            while (k < row_starts[r + 1] && block < blocks && columns[k] / kernel < block * channels) k++;
            cuts[i * (blocks + 1) + block] = block == blocks ? row_starts[r + 1] : k;
        }
        for (k = row_starts[r]; k < row_starts[r + 1]; k++) {
            int64_t rest = columns[k] % kernel;
            offsets[k] = slot_of[r / out_group * in_group + columns[k] / kernel] * a_plane + rest / s.kw * s.dh * pitch + rest % s.kw * s.dw;
        }
    }

    const int64_t example_groups = (s.n + LANES - 1) / LANES;
    const Walk proto = {0, s.wo, s.sh * pitch, s.sw};
    const Block *one = s.sw == 1 ? unit_blocks.one : stepping_blocks.one;
    const Block *dense = s.sw == 1 ? unit_blocks.dense : stepping_blocks.dense;
    int failed = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : failed)
    for (int64_t g = 0; g < example_groups; g++) {
        pin();
        vec *a_tile = scratch.take(a_count * a_plane + b_count * (b_plane + 1));
        if (!a_tile) {
            failed = 1;
            continue;
        }
        vec *b_tile = a_tile + a_count * a_plane, *sums = b_tile + b_count * b_plane;
        std::fill(sums, sums + b_count, vec{});
        const int valid = static_cast<int>(std::min<int64_t>(LANES, s.n - g * LANES));
        vec *out = reinterpret_cast<vec *>(values) + g * live;
        Squares total, bias_total;
        for (int64_t first = 0; first < s.ho; first += rows) {
            const int64_t count = std::min(rows, s.ho - first);
            const int64_t start = first * s.sh - s.ph, low = std::max<int64_t>(0, start), high = std::min(s.h, start + band(count));
            const bool begins = first == 0, ends = first + count == s.ho;
            if (s.pw || low != start || high != start + band(count) || s.w < pitch) std::memset((void *)a_tile, 0, a_count * a_plane * sizeof(vec));
            if (high > low)
                pack(a + g * LANES * s.a.example, s.a, valid, s.w, low, high, inputs, a_tile, a_plane, pitch, low - start, s.pw, nullptr);
            pack(b + g * LANES * s.b.example, s.b, valid, s.wo, first, first + count, outputs, b_tile, b_plane, s.wo, 0, 0, bias ? sums : nullptr);

            Walk walk = proto;
            walk.rows = count;
            if (s.kw == 1 && s.kh == 1 && s.sw == 1 && s.sh == 1) walk = {1, count * s.wo, 0, 1};
            auto settle = [&](int64_t k, vec v) {
                if (!begins) v += out[k];
                out[k] = v;
                if (ends) total.add(v);
            };
            for (int64_t at = 0; at < blocks; at++) {
                int64_t i = 0;
                if (product) {
                    for (; i + ROWS <= b_count; i += ROWS) {
                        const int64_t *cut = &cuts[i * (blocks + 1) + at];
                        const int64_t from = cut[0], length = cut[1] - cut[0];
                        bool same = true;
                        const vec *bp[ROWS];
                        int64_t base[ROWS];
                        for (int q = 0; q < ROWS; q++) {
                            bp[q] = b_tile + (i + q) * b_plane;
                            base[q] = cut[q * (blocks + 1)];
                            same = same && cut[q * (blocks + 1) + 1] - base[q] == length && outputs[i + q] / out_group == outputs[i] / out_group;
                        }
                        if (!same) break;
                        for (int64_t k = 0; k < length; k += COLUMNS) {
                            const int take = static_cast<int>(std::min<int64_t>(COLUMNS, length - k));
                            const vec *ap[COLUMNS];
                            vec result[ROWS * COLUMNS];
                            for (int p = 0; p < take; p++) ap[p] = a_tile + offsets[from + k + p];
                            dense[take](bp, ap, walk, result);
                            for (int q = 0; q < ROWS; q++)
                                for (int p = 0; p < take; p++) settle(base[q] + k + p, result[q * take + p]);
                        }
                    }
                }
                for (; i < b_count; i++) {
                    const vec *bp = b_tile + i * b_plane;
                    const int64_t stop = cuts[i * (blocks + 1) + at + 1];
                    for (int64_t k = cuts[i * (blocks + 1) + at]; k < stop; k += WIDE) {
                        const int take = static_cast<int>(std::min<int64_t>(WIDE, stop - k));
                        const vec *ap[WIDE];
                        vec result[WIDE];
                        for (int p = 0; p < take; p++) ap[p] = a_tile + offsets[k + p];
                        one[take](&bp, ap, walk, result);
                        for (int p = 0; p < take; p++) settle(k + p, result[p]);
                    }
                }
            }
        }
        total.write(squared + g * LANES);
        if (!bias) continue;
        for (int64_t i = 0; i < b_count; i++) {
            if (bias_at[i] < 0) continue;
            reinterpret_cast<vec *>(bias)[g * biases + bias_at[i]] = sums[i];
            bias_total.add(sums[i]);
        }
        bias_total.write(squared + (example_groups + g) * LANES);
    }
    return failed;
}

// out[w] = sum over examples of factors[i] * values[.., w, i]; values (groups, live, LANES), factors (groups * LANES). Examples
// of factor 0 are left out whatever their values are.
void weighted_values(int64_t groups, int64_t live, const float *values, const double *factors, double *out) {
    std::vector<bits> present(groups);
    for (int64_t g = 0; g < groups; g++)
        for (int i = 0; i < LANES; i++) present[g][i] = factors[g * LANES + i] != 0 ? -1 : 0;
#pragma omp parallel num_threads(threads)
    {
        pin();
#pragma omp for schedule(static)
        for (int64_t w = 0; w < live; w++) {
            half sum[HALVES] = {};
            for (int64_t g = 0; g < groups; g++) {
                alignas(64) float lane[LANES];
                *reinterpret_cast<bits *>(lane) = *reinterpret_cast<const bits *>(values + (g * live + w) * LANES) & present[g];
                for (int h = 0; h < HALVES; h++) sum[h] += widen(lane + h * HALF) * load(factors + g * LANES + h * HALF);
            }
            out[w] = across(sum[0] + sum[1]);
        }
    }
}

// squared[i] = sum over w of values[.., w, i] squared.
void squared_values(int64_t groups, int64_t live, const float *values, double *squared) {
    const vec *v = reinterpret_cast<const vec *>(values);
    pin();
    for (int64_t g = 0; g < groups; g++) {
        Squares total;
        for (int64_t w = 0; w < live; w++) total.add(v[g * live + w]);
        total.write(squared + g * LANES);
    }
}

// (n, count) with a row stride -> (count, groups * LANES), examples side by side, zero-padded.
static void turned(int64_t n, int64_t count, int64_t stride, const float *source, float *target) {
    const int64_t groups = (n + LANES - 1) / LANES;
    vec *to = reinterpret_cast<vec *>(target);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t g = 0; g < groups; g++) {
        const int valid = static_cast<int>(std::min<int64_t>(LANES, n - g * LANES));
        turn(source + g * LANES * stride, stride, valid, count, 64, [&](int64_t i, vec v) { to[i * groups + g] = v; });
    }
}

// squared[i] = sum over live (r, k) of b[r, i]^2 a[k, i]^2 for GROUPS groups from `g` on.
extern "C++" {
template <int GROUPS>
static void squared_groups(int64_t g, int64_t width, int64_t rows, const float *a, const float *b, const int64_t *row_starts,
                           const int32_t *columns, double *squared) {
    constexpr int COUNT = GROUPS * HALVES;
    half total[COUNT] = {};
    const float *const from = a + g * LANES, *const scale = b + g * LANES;
    for (int64_t r = 0; r < rows; r++) {
        half sum[COUNT] = {};
        for (int64_t k = row_starts[r]; k < row_starts[r + 1]; k++) {
            const float *p = from + columns[k] * width;
#pragma GCC unroll 8
            for (int h = 0; h < COUNT; h++) {
                const half x = widen(p + h * HALF);
                sum[h] += x * x;
            }
        }
        for (int h = 0; h < COUNT; h++) {
            const half y = widen(scale + r * width + h * HALF);
            total[h] += sum[h] * (y * y);
        }
    }
    for (int h = 0; h < COUNT; h++) store(squared + g * LANES + h * HALF, total[h]);
}
}

// squared[i] = sum over live (r, k) of b[i, r]^2 a[i, k]^2; a (n, inputs), b (n, rows), both with a row stride. turned_a (inputs,
// groups * LANES) stays for linear_sum, turned_b (rows, groups * LANES) is scratch.
void linear_squared(int64_t n, int64_t inputs, int64_t rows, const float *a, int64_t a_stride, const float *b, int64_t b_stride,
                    const int64_t *row_starts, const int32_t *columns, float *turned_a, float *turned_b, double *squared) {
    turned(n, inputs, a_stride, a, turned_a);
    turned(n, rows, b_stride, b, turned_b);
    const int64_t groups = (n + LANES - 1) / LANES, width = groups * LANES;
    constexpr int64_t TOGETHER = 4;
    constexpr decltype(&squared_groups<1>) of[TOGETHER + 1] = {nullptr, squared_groups<1>, squared_groups<2>, squared_groups<3>,
                                                               squared_groups<4>};
#pragma omp parallel num_threads(threads)
    {
        pin();
#pragma omp for schedule(static)
        for (int64_t g = 0; g < groups; g += TOGETHER)
            of[std::min(TOGETHER, groups - g)](g, width, rows, turned_a, turned_b, row_starts, columns, squared);
    }
}

// out[w] = sum over examples of factors[i] b[i, r] a[k, i] for the live weights w = (r, k); turned_a as linear_squared left it,
// turned_b (rows, groups * LANES) scratch in float64. Examples of factor 0 are left out whatever they hold: their lanes are cleared.
void linear_sum(int64_t n, int64_t inputs, int64_t rows, float *turned_a, const float *b, int64_t b_stride, const double *factors,
                const int64_t *row_starts, const int32_t *columns, double *turned_b, double *out) {
    const int64_t groups = (n + LANES - 1) / LANES, width = groups * LANES;
#pragma omp parallel num_threads(threads)
    {
        pin();
#pragma omp for schedule(static)
        for (int64_t g = 0; g < groups; g++) {
            const int valid = static_cast<int>(std::min<int64_t>(LANES, n - g * LANES));
            const double *factor = factors + g * LANES;
            bits present;
            for (int i = 0; i < LANES; i++) present[i] = factor[i] != 0 ? -1 : 0;
            turn(b + g * LANES * b_stride, b_stride, valid, rows, 64, [&](int64_t r, vec v) {
                alignas(64) float lane[LANES];
                *reinterpret_cast<bits *>(lane) = (bits)v & present;
                for (int h = 0; h < HALVES; h++)
                    store(turned_b + r * width + g * LANES + h * HALF, widen(lane + h * HALF) * load(factor + h * HALF));
            });
            for (int64_t k = 0; k < inputs; k++) *reinterpret_cast<bits *>(turned_a + k * width + g * LANES) &= present;
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const double *row = turned_b + r * width;
            int64_t k = row_starts[r];
            const int64_t stop = row_starts[r + 1];
            auto product = [&](auto count) {
                constexpr int COUNT = decltype(count)::value;
                half sum[COUNT][HALVES] = {};
                const float *p[COUNT];
                for (int q = 0; q < COUNT; q++) p[q] = turned_a + columns[k + q] * width;
                for (int64_t at = 0; at < width; at += LANES)
                    for (int h = 0; h < HALVES; h++) {
                        const half scale = load(row + at + h * HALF);
                        for (int q = 0; q < COUNT; q++) sum[q][h] += scale * widen(p[q] + at + h * HALF);
                    }
                for (int q = 0; q < COUNT; q++) out[k + q] = across(sum[q][0] + sum[q][1]);
                k += COUNT;
            };
            while (k + 4 <= stop) product(std::integral_constant<int, 4>());
            while (k < stop) product(std::integral_constant<int, 1>());
        }
    }
}

// Per-example gradients of a group normalisation's weight and bias; a, b (n, channels, size) contiguous; out (n, channels).
// Mean and variance are taken again from the input, in two passes: one pass of squares would lose a large mean.
void group_norm_values(int64_t n, int64_t channels, int64_t groups, int64_t size, double epsilon, const float *a, const float *b,
                       float *weight, float *bias) {
    const int64_t length = channels / groups * size;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t at = 0; at < n * groups; at++) {
        pin();
        const float *x = a + at * length, *d = b + at * length;
        auto sum = [&](const float *from, int64_t count, auto value) {
            vec s0 = {}, s1 = {};
            int64_t i = 0;
            for (; i + 2 * LANES <= count; i += 2 * LANES) {
                s0 += value(load(from + i), i);
                s1 += value(load(from + i + LANES), i + LANES);
            }
            double total = static_cast<double>(across(s0 + s1));
            for (; i < count; i++) {
                vec single = {};
                single[0] = from[i];
                total += static_cast<double>(value(single, i)[0]);
            }
            return total;
        };
        const float mean = static_cast<float>(sum(x, length, [](vec v, int64_t) { return v; }) / static_cast<double>(length));
        const double variance = sum(x, length, [mean](vec v, int64_t) { return (v - mean) * (v - mean); }) / static_cast<double>(length);
        const double scale = 1.0 / __builtin_sqrt(variance + epsilon);
        for (int64_t c = 0; c < channels / groups; c++) {
            const float *xc = x + c * size, *dc = d + c * size;
            vec cross = {}, plain = {};
            int64_t i = 0;
            for (; i + LANES <= size; i += LANES) {
                vec g = load(dc + i);
                plain += g;
                cross += g * (load(xc + i) - mean);
            }
            double p = static_cast<double>(across(plain)), q = static_cast<double>(across(cross));
            for (; i < size; i++) p += dc[i], q += static_cast<double>(dc[i]) * static_cast<double>(xc[i] - mean);
            bias[at * (channels / groups) + c] = static_cast<float>(p);
            weight[at * (channels / groups) + c] = static_cast<float>(q * scale);
        }
    }
}

}  // extern "C"
