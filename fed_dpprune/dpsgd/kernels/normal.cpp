// Standard normals as numpy draws them, to the bit, and the passes of a private step that stand around them.
//
// Built without contraction of a * b + c: each value is rounded where numpy rounds it. One thread.
// Philox4x64-10: Salmon et al. 2011. The ziggurat's layers come from dpsgd/ziggurat.py, laid out as said there.

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512IFMA__)
#include <immintrin.h>
#define WIDE_WORDS 1
#endif

namespace {

constexpr uint64_t MULTIPLY_0 = 0xD2E7470EE14C6C93u, MULTIPLY_1 = 0xCA5A826395121157u;
constexpr uint64_t STEP_0 = 0x9E3779B97F4A7C15u, STEP_1 = 0xBB67AE8584CAA73Bu;
constexpr int ROUNDS = 10, GROUP = 8;
constexpr int64_t WORDS = 1024;  // of a refill
constexpr int64_t CHUNK = 1024;  // values that are drawn and used while they are close
constexpr uint64_t MAGNITUDE = (uint64_t(1) << 52) - 1;
constexpr double TAIL = 3.6541528853610088, ONE_OVER_TAIL = 0.27366123732975828;

struct Layer {
    double width;  // over 2^52
    uint64_t inside;
};

struct Table {
    Layer layers[256];
    double height[256];
};

// A stream. The words from `position` on are still to be used; each with the value it stands for if it is inside its layer,
// and a bit that says that it is not.
struct State {
    uint64_t key[2], counter, position, unused[4], outside[WORDS / 64], words[WORDS];
    double values[WORDS + GROUP];  // the last group is there to be read past the end
};

struct Keys {
    uint64_t low[ROUNDS], high[ROUNDS];
    explicit Keys(const uint64_t *key) {
        for (uint64_t r = 0; r < ROUNDS; r++) low[r] = key[0] + r * STEP_0, high[r] = key[1] + r * STEP_1;
    }
};

inline uint64_t upper(uint64_t a, uint64_t b) { return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64); }

// The counter is one number here, never 256 bits wide: so after one round the block is (low, 0, upper ^ high, lower), and the
// first product of the second round is the same for the whole stream.

#if WIDE_WORDS
inline __m512i all(uint64_t v) { return _mm512_set1_epi64(static_cast<long long>(v)); }
inline __m512i mixed(__m512i a, __m512i b, uint64_t key) { return _mm512_ternarylogic_epi64(a, b, all(key), 0x96); }

template <uint64_t FACTOR>
inline __m512i upper(__m512i x) {  // of x * FACTOR, exactly: x in 52 and 12 bits, FACTOR too
    static_assert((FACTOR & MAGNITUDE) < uint64_t(3) << 50, "the sum below would leave its 64 bits");
    const __m512i low = all(FACTOR & MAGNITUDE), high = all(FACTOR >> 52), none = _mm512_setzero_si512();
    const __m512i top = _mm512_srli_epi64(x, 52), rest = _mm512_srli_epi64(x, 12), bottom = _mm512_and_epi64(x, all(0xfff));
    __m512i sum = _mm512_madd52lo_epu64(_mm512_madd52hi_epu64(none, x, low), bottom, high);
    sum = _mm512_add_epi64(sum, _mm512_mullo_epi64(top, low));
    return _mm512_add_epi64(_mm512_mullo_epi64(rest, high), _mm512_srli_epi64(sum, 12));
}

template <uint64_t FACTOR>
inline __m512i lower(__m512i x) { return _mm512_mullo_epi64(x, all(FACTOR)); }

inline void store(const __m512i *c, uint64_t *out) {  // eight blocks, one a lane -> one after the other
    const __m512i ab_even = _mm512_unpacklo_epi64(c[0], c[1]), ab_odd = _mm512_unpackhi_epi64(c[0], c[1]);
    const __m512i cd_even = _mm512_unpacklo_epi64(c[2], c[3]), cd_odd = _mm512_unpackhi_epi64(c[2], c[3]);
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), last = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512i even[2] = {_mm512_permutex2var_epi64(ab_even, first, cd_even), _mm512_permutex2var_epi64(ab_even, last, cd_even)};
    const __m512i odd[2] = {_mm512_permutex2var_epi64(ab_odd, first, cd_odd), _mm512_permutex2var_epi64(ab_odd, last, cd_odd)};
    for (int half = 0; half < 2; half++) {
        _mm512_storeu_si512(out + 16 * half, _mm512_shuffle_i64x2(even[half], odd[half], 0x44));
        _mm512_storeu_si512(out + 16 * half + 8, _mm512_shuffle_i64x2(even[half], odd[half], 0xee));
    }
}

// Blocks counter + 1 .. counter + 8 * TOGETHER; several vectors at once, for one alone waits for its own products.
template <int TOGETHER>
inline void blocks(const Keys &keys, uint64_t counter, uint64_t *out) {
    __m512i c[TOGETHER][4];
    const uint64_t constant = MULTIPLY_0 * keys.low[0], carried = upper(MULTIPLY_0, keys.low[0]) ^ keys.high[1];
    for (int g = 0; g < TOGETHER; g++) {
        const __m512i n = _mm512_add_epi64(all(counter + 1 + 8 * g), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
        const __m512i x = _mm512_xor_epi64(upper<MULTIPLY_0>(n), all(keys.high[0]));
        c[g][0] = _mm512_xor_epi64(upper<MULTIPLY_1>(x), all(keys.low[1]));
        c[g][1] = lower<MULTIPLY_1>(x);
        c[g][2] = _mm512_xor_epi64(lower<MULTIPLY_0>(n), all(carried));
        c[g][3] = all(constant);
    }
#pragma GCC unroll 8
    for (int r = 2; r < ROUNDS; r++) {
#pragma GCC unroll 4
        for (int g = 0; g < TOGETHER; g++) {
            const __m512i a = c[g][0], b = c[g][2];
            c[g][0] = mixed(upper<MULTIPLY_1>(b), c[g][1], keys.low[r]);
            c[g][2] = mixed(upper<MULTIPLY_0>(a), c[g][3], keys.high[r]);
            c[g][1] = lower<MULTIPLY_1>(b);
            c[g][3] = lower<MULTIPLY_0>(a);
        }
    }
    for (int g = 0; g < TOGETHER; g++) store(c[g], out + 32 * g);
}
constexpr int TOGETHER = 4, MADE = 4 * 8 * TOGETHER;  // words at a time
#else
template <int TOGETHER>
inline void blocks(const Keys &keys, uint64_t counter, uint64_t *out) {
    const uint64_t constant = MULTIPLY_0 * keys.low[0], carried = upper(MULTIPLY_0, keys.low[0]) ^ keys.high[1];
    uint64_t c[TOGETHER][4];
    for (int g = 0; g < TOGETHER; g++) {
        const uint64_t n = counter + 1 + static_cast<uint64_t>(g), x = upper(MULTIPLY_0, n) ^ keys.high[0];
        c[g][0] = upper(MULTIPLY_1, x) ^ keys.low[1], c[g][1] = MULTIPLY_1 * x;
        c[g][2] = MULTIPLY_0 * n ^ carried, c[g][3] = constant;
    }
    for (int r = 2; r < ROUNDS; r++) {
        for (int g = 0; g < TOGETHER; g++) {
            const uint64_t a = c[g][0], b = c[g][2];
            c[g][0] = upper(MULTIPLY_1, b) ^ c[g][1] ^ keys.low[r], c[g][2] = upper(MULTIPLY_0, a) ^ c[g][3] ^ keys.high[r];
            c[g][1] = MULTIPLY_1 * b, c[g][3] = MULTIPLY_0 * a;
        }
    }
    std::memcpy(out, c, sizeof(c));
}
constexpr int TOGETHER = 2, MADE = 4 * TOGETHER;
#endif

// GROUP words as values; returns a bit for each that is outside its layer.
inline uint64_t group(const uint64_t *words, const Layer *layers, double *out) {
#if WIDE_WORDS
    auto entry = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(layers + (words[i] & 255))); };
    auto pair = [&](int i, int j) { return _mm256_inserti128_si256(_mm256_castsi128_si256(entry(i)), entry(j), 1); };
    const __m512i even = _mm512_inserti64x4(_mm512_castsi256_si512(pair(0, 2)), pair(4, 6), 1);
    const __m512i odd = _mm512_inserti64x4(_mm512_castsi256_si512(pair(1, 3)), pair(5, 7), 1);
    const __m512i word = _mm512_loadu_si512(words);
    const __m512i magnitude = _mm512_and_epi64(_mm512_srli_epi64(word, 9), all(MAGNITUDE));
    const __m512i sign = _mm512_slli_epi64(_mm512_and_epi64(word, all(256)), 55);
    const __m512d width = _mm512_castsi512_pd(_mm512_unpacklo_epi64(even, odd));
    const __m512d x = _mm512_mul_pd(_mm512_cvtepi64_pd(magnitude), width);
    _mm512_storeu_pd(out, _mm512_xor_pd(x, _mm512_castsi512_pd(sign)));
    return _mm512_cmpge_epu64_mask(magnitude, _mm512_unpackhi_epi64(even, odd));
#else
    uint64_t outside = 0;
    for (int i = 0; i < GROUP; i++) {
        const uint64_t magnitude = words[i] >> 9 & MAGNITUDE;
        const Layer &layer = layers[words[i] & 255];
        const double x = static_cast<double>(static_cast<int64_t>(magnitude)) * layer.width;
        uint64_t bits;
        std::memcpy(&bits, &x, 8);
        bits ^= (words[i] & 256) << 55;
        std::memcpy(out + i, &bits, 8);
        outside |= static_cast<uint64_t>(magnitude >= layer.inside) << i;
    }
    return outside;
#endif
}

void refill(State &s, const Table &table) {
    const Keys keys(s.key);
    for (int64_t i = 0; i < WORDS; i += MADE) blocks<TOGETHER>(keys, s.counter + static_cast<uint64_t>(i / 4), s.words + i);
    for (int64_t i = 0; i < WORDS; i += 64) {
        uint64_t outside = 0;
        for (int j = 0; j < 64; j += GROUP) outside |= group(s.words + i + j, table.layers, s.values + i + j) << j;
        s.outside[i / 64] = outside;
    }
    s.counter += WORDS / 4;
    s.position = 0;
}

inline uint64_t next(State &s, const Table &table) {
    if (s.position == WORDS) refill(s, table);
    return s.words[s.position++];
}

inline double uniform(State &s, const Table &table) {
    return static_cast<double>(static_cast<int64_t>(next(s, table) >> 11)) * 0x1p-53;
}

double tail(State &s, const Table &table, bool negative) {
    for (;;) {
        const double beyond = -ONE_OVER_TAIL * std::log1p(-uniform(s, table)), room = -std::log1p(-uniform(s, table));
        if (room + room > beyond * beyond) return negative ? -(TAIL + beyond) : TAIL + beyond;
    }
}

// The next word, known to be outside its layer, and more words, as a value; returns 0 when none came of it.
inline int64_t attempt(State &s, const Table &table, double *out) {
    const double x = s.values[s.position];
    const uint64_t word = next(s, table), layer = word & 255;
    *out = x;
    if (layer == 0) {
        *out = tail(s, table, word >> 17 & 1);
        return 1;
    }
    // No branch on what comes out: nobody could foretell it.
    return (table.height[layer - 1] - table.height[layer]) * uniform(s, table) + table.height[layer] < std::exp(-0.5 * x * x);
}

// Words from `position` on before the next that is outside, or to the end.
inline int64_t run(const State &s) {
    uint64_t at = s.position / 64, bits = s.outside[at] & ~uint64_t(0) << s.position % 64;
    while (!bits) {
        if (++at == WORDS / 64) return WORDS - static_cast<int64_t>(s.position);
        bits = s.outside[at];
    }
    return static_cast<int64_t>(64 * at + static_cast<uint64_t>(__builtin_ctzll(bits)) - s.position);
}

// Values `from` .. `from + length`, GROUP at a time as long as `room` is left for a whole group more.
inline void copy(const double *from, int64_t length, int64_t room, double *out) {
    if (length + GROUP > room) {
        std::memcpy(out, from, static_cast<size_t>(length) * sizeof(double));
    } else {
        for (int64_t i = 0; i < length; i += GROUP) std::memcpy(out + i, from + i, GROUP * sizeof(double));
    }
}

// The next `count` values of a stream.
inline void draw(State &s, const Table &table, int64_t count, double *out) {
    for (int64_t i = 0; i < count;) {
        if (s.position == WORDS) refill(s, table);
        const int64_t inside = run(s), length = inside < count - i ? inside : count - i;
        copy(s.values + s.position, length, count - i, out + i);
        s.position += static_cast<uint64_t>(length), i += length;
        if (length == inside && i < count && s.position < WORDS) i += attempt(s, table, out + i);
    }
}

}  // namespace

extern "C" {

int64_t normal_state_words() { return sizeof(State) / sizeof(uint64_t); }
int64_t normal_state_empty() { return WORDS; }

// The next `count` normals of a stream.
//   state   struct State; a new one has its key, counter 0 and position normal_state_empty()
//   table   256 layers, then 256 heights
void normals(uint64_t *state, const uint64_t *table, int64_t count, double *out) {
    draw(*reinterpret_cast<State *>(state), *reinterpret_cast<const Table *>(table), count, out);
}

struct Numbers {
    double scale, divisor, rescale, rate, decay, momentum;
};

// A private step on live values, chunk by chunk: mean = (sum + scale * noise) / divisor * rescale, then
// velocity = momentum * velocity + mean + decay * value, then value -= rate * velocity. Every value gets noise of its own.
//   state, table  where the noise is drawn from; or null, with `noise` drawn already, one for each value
//   velocity      null: there is no momentum, velocity = mean + decay * value
void noised_descent(uint64_t *state, const uint64_t *table, const double *noise, int64_t count, const double *sum,
                    const double *numbers, double *velocity, float *value) {
    Numbers n;
    std::memcpy(&n, numbers, sizeof(n));
    alignas(64) double drawn[CHUNK];
    for (int64_t start = 0; start < count; start += CHUNK) {
        const int64_t size = count - start < CHUNK ? count - start : CHUNK;
        if (!noise) draw(*reinterpret_cast<State *>(state), *reinterpret_cast<const Table *>(table), size, drawn);
        const double *z = noise ? noise + start : drawn;
        const double *total = sum + start;
        float *weight = value + start;
        if (velocity) {
            double *v = velocity + start;
            for (int64_t i = 0; i < size; i++) {
                const double mean = (total[i] + n.scale * z[i]) / n.divisor * n.rescale;
                const double now = static_cast<double>(weight[i]);
                v[i] = n.momentum * v[i] + mean + n.decay * now;
                weight[i] = static_cast<float>(now - n.rate * v[i]);
            }
        } else {
            for (int64_t i = 0; i < size; i++) {
                const double mean = (total[i] + n.scale * z[i]) / n.divisor * n.rescale;
                const double now = static_cast<double>(weight[i]);
                weight[i] = static_cast<float>(now - n.rate * (mean + n.decay * now));
            }
        }
    }
}

// target[position[i]] = value[i]
void scatter(int64_t count, const int64_t *position, const float *value, float *target) {
    for (int64_t i = 0; i < count; i++) target[position[i]] = value[i];
}

}
