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
constexpr int64_t BLOCKS = 128, WORDS = 4 * BLOCKS;  // made at a time: 4 KiB
constexpr uint64_t MAGNITUDE = (uint64_t(1) << 52) - 1;
constexpr double TAIL = 3.6541528853610088, ONE_OVER_TAIL = 0.27366123732975828;

struct State {  // a stream; the words from `position` on are still to be used
    uint64_t key[2], counter, position, words[WORDS];
};

struct Layer {
    double width;  // over 2^52
    uint64_t inside;
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
inline __m512i upper(__m512i x) {  // of x * FACTOR, exactly: x in 52 and 12 bits, FACTOR too; no sum below leaves 64 bits
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
constexpr int TOGETHER = 2, STRIDE = 8 * TOGETHER;
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
constexpr int TOGETHER = 2, STRIDE = TOGETHER;
#endif

void refill(State &s) {
    const Keys keys(s.key);
    for (int64_t i = 0; i < BLOCKS; i += STRIDE) blocks<TOGETHER>(keys, s.counter + static_cast<uint64_t>(i), s.words + 4 * i);
    s.counter += BLOCKS;
    s.position = 0;
}

inline uint64_t next(State &s) {
    if (s.position == WORDS) refill(s);
    return s.words[s.position++];
}

inline double uniform(State &s) { return static_cast<double>(static_cast<int64_t>(next(s) >> 11)) * 0x1p-53; }

inline double tail(State &s, bool negative) {
    for (;;) {
        const double beyond = -ONE_OVER_TAIL * std::log1p(-uniform(s)), room = -std::log1p(-uniform(s));
        if (room + room > beyond * beyond) return negative ? -(TAIL + beyond) : TAIL + beyond;
    }
}

// The next word as a value, and more words where it is outside its layer; returns 0 when no value came of it.
inline int attempt(State &s, const Layer *layers, const double *height, double *out) {
    const uint64_t word = next(s), layer = word & 255, magnitude = word >> 9 & MAGNITUDE;
    const double x = static_cast<double>(static_cast<int64_t>(magnitude)) * layers[layer].width;
    *out = word & 256 ? -x : x;
    if (magnitude < layers[layer].inside) return 1;
    if (layer == 0) {
        *out = tail(s, magnitude >> 8 & 1);
        return 1;
    }
    // No branch on what comes out: nobody could foretell it.
    return (height[layer - 1] - height[layer]) * uniform(s) + height[layer] < std::exp(-0.5 * x * x);
}

// GROUP words as values; returns how many stand before the first that is outside its layer (the rest means nothing).
inline int group(const uint64_t *words, const Layer *layers, double *out) {
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
    const unsigned outside = _mm512_cmpge_epu64_mask(magnitude, _mm512_unpackhi_epi64(even, odd));
    return __builtin_ctz(outside | 1u << GROUP);
#else
    unsigned outside = 1u << GROUP;
    for (int i = 0; i < GROUP; i++) {
        const uint64_t magnitude = words[i] >> 9 & MAGNITUDE;
        const Layer &layer = layers[words[i] & 255];
        const double x = static_cast<double>(static_cast<int64_t>(magnitude)) * layer.width;
        uint64_t bits;
        std::memcpy(&bits, &x, 8);
        bits ^= (words[i] & 256) << 55;
        std::memcpy(out + i, &bits, 8);
        outside |= static_cast<unsigned>(magnitude >= layer.inside) << i;
    }
    return __builtin_ctz(outside);
#endif
}

}  // namespace

extern "C" {

int64_t normal_state_words() { return sizeof(State) / sizeof(uint64_t); }
int64_t normal_state_empty() { return WORDS; }

// The next `count` normals of a stream.
//   state   struct State; a new one has its key, counter 0 and position normal_state_empty()
//   table   256 layers, then 256 heights
void normals(uint64_t *state, const uint64_t *table, int64_t count, double *out) {
    State &s = *reinterpret_cast<State *>(state);
    const Layer *layers = reinterpret_cast<const Layer *>(table);
    const double *height = reinterpret_cast<const double *>(table + 2 * 256);
    for (int64_t i = 0; i < count;) {
        if (s.position == WORDS) refill(s);
        if (count - i < GROUP || WORDS - static_cast<int64_t>(s.position) < GROUP) {
            i += attempt(s, layers, height, out + i);
            continue;
        }
        const int inside = group(s.words + s.position, layers, out + i);
        if (__builtin_expect(inside == GROUP, 1)) {  // a branch, so that the next group need not wait for this one's count
            s.position += GROUP, i += GROUP;
        } else {
            s.position += static_cast<uint64_t>(inside), i += inside;
            i += attempt(s, layers, height, out + i);
        }
    }
}

// noise[i] = (sum[i] + scale * noise[i]) / divisor
void noised_mean(int64_t count, const float *sum, double scale, double divisor, double *noise) {
    for (int64_t i = 0; i < count; i++) noise[i] = (static_cast<double>(sum[i]) + scale * noise[i]) / divisor;
}

// velocity = momentum * velocity + mean + decay * value; value -= rate * velocity. Without velocity: momentum is none.
void descend(int64_t count, const double *mean, double rate, double momentum, double decay, double *velocity, float *value) {
    if (velocity) {
        for (int64_t i = 0; i < count; i++) {
            const double now = static_cast<double>(value[i]);
            velocity[i] = momentum * velocity[i] + mean[i] + decay * now;
            value[i] = static_cast<float>(now - rate * velocity[i]);
        }
    } else {
        for (int64_t i = 0; i < count; i++) {
            const double now = static_cast<double>(value[i]);
            value[i] = static_cast<float>(now - rate * (mean[i] + decay * now));
        }
    }
}

}
