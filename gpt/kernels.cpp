// Decoding on a CPU: products of a few rows with a matrix that is read once, and whole blocks for a few
// tokens. What a block is made of is data (Layer). gpt/kernels.py compiles this file and is its interface.
//
// Some functions have a version for an instruction set, between #if and #endif. Small work is done by
// every thread, so that none waits for another.

#include "vectors.h"

#include <functional>
#include <vector>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// A matrix [N, K] and what is added to a product with it. Formats: 0 float32, 1 bfloat16, 2 int8,
// 3 int4, 4 int8 and 5 int4 of GGUF files. Rows of 2 and 3 are padded to a multiple of 128, and K of
// 4 and 5 is a multiple of 32; gpt/generation/quantisation.py documents them.
struct Matrix {
  long format, N, K;
  const void *weights, *scales, *lows;
  const float* bias;
};

// Kinds: 0 no norm, 1 LayerNorm, 2 RMSNorm. Weight and bias may be null.
struct Norm {
  long kind;
  const float *weight, *bias;
  double epsilon;
};

// down(activation(up x)), or with a gate down(activation(gate x) * up x).
struct FeedForward {
  Matrix up, gate, down;  // a gate without weights is none
};

// Keys and values [B, Hkv, slots, D] of one layer, float32, bfloat16 or int8, the last with a scale
// for each slot, [B, Hkv, slots]; strides are in numbers. With a window, tokens behind the first `sinks` are in a ring of the other slots. With a
// block size, a query sees its `local` newest blocks, the `first` ones, and `random` drawn ones.
struct Store {
  void *keys, *values;
  float *key_scales, *value_scales;  // null unless the numbers are int8
  long row_stride, head_stride, slots, window, sinks, block, local, first, random;
};

// The angles by which queries and keys are rotated: position times turns[i], for `pairs` pairs of a
// head's numbers; cosines and sines are multiplied by `factor`. xPos: queries are multiplied by
// decay[i] ** (position / 512), and keys divided. Towards sinks, a query's position is at most `last`.
struct Rotary {
  long pairs, last;
  const float *turns, *decay;
  double factor;
};

struct Layer {
  Norm attn_norm, mlp_norm;          // before the branches
  Norm attn_out_norm, mlp_out_norm;  // after them
  Norm q_norm, k_norm;               // of each head
  Matrix qkv, out;
  const FeedForward* experts;  // n_expert of them and then n_shared, or one without a router
  Matrix router;               // [n_expert, C]
  const float* preference;     // added to the router's scores for the choice alone, or null
  long n_expert, n_active, n_shared, by_sigmoid, renormalise;
  double scale, softcap;       // of the attention scores
  const float *slopes, *sinks;  // of each head: ALiBi's, and learned scores of no key; or null
  long rotary;                 // the number of its Rotary, or -1
  long top_k;                  // keys with the largest scores, or 0 for all
  Store store;
};

// parallel: both branches read the same stream. numbers: of the cache, 0 float32, 1 bfloat16, 2 int8.
struct Shape {
  long n_layer, n_head, kv_heads, head_dim, activation, parallel, numbers, n_rotary;
  const Rotary* rotaries;
};

// A token's row of the cache, and its position in it.
struct Token {
  long row, at;
};

namespace {

constexpr long GROUP = 32;         // activations, and weights of int4, with one scale
constexpr long HALF = GROUP / 2;
constexpr long CHUNK = 128;      // weights of int8 and int4 whose bytes are interleaved
constexpr long AHEAD = 2048;       // bytes that are asked for before they are needed
constexpr long SMALL = 1 << 15;  // numbers of a matrix that one thread reads alone
constexpr long BLOCK = 64;       // rows of a matrix that meet all activations in turn
constexpr int AT_ONCE = 4;       // rows of activations that meet a row of the matrix at once

inline long padded(long n) { return (n + CHUNK - 1) / CHUNK * CHUNK; }

inline Floats floats(const int8_t* from) {
#if defined(GPT_AVX512)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from)));
#elif defined(GPT_AVX2)
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
  Floats all;
  for (int i = 0; i < LANES; i++) all[i] = from[i];
  return all;
#endif
}

struct Float16 {
  uint16_t bits;
};

inline float number(Float16 half) {
#if defined(__F16C__)
  return _cvtsh_ss(half.bits);
#else
  uint32_t sign = (half.bits & 0x8000u) << 16, rest = (half.bits & 0x7fffu) << 13;
  float value;
  std::memcpy(&value, &rest, sizeof value);
  value *= 0x1p112f;  // the exponents' zeros differ
  std::memcpy(&rest, &value, sizeof value);
  if (rest >= 0x47800000) rest |= 0x7f800000;  // 2^16 and more are infinity and NaN
  rest |= sign;
  std::memcpy(&value, &rest, sizeof value);
  return value;
#endif
}

inline Floats floats(const Float16* from) {
#if defined(GPT_AVX512)
  return (Floats)_mm512_cvtph_ps(load<__m256i>(from));
#elif defined(GPT_AVX2) && defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(load<__m128i>(from));
#else
  Floats all;
  for (int i = 0; i < LANES; i++) all[i] = number(from[i]);
  return all;
#endif
}

template <class Number>
inline void put_half(Number* to, const float* numbers, long size) {  // the first `size` of HALF
  for (long i = 0; i < std::min(HALF, size); i += LANES)
    put(to + i, floats(numbers + i), std::min(LANES, size - i));
}

inline void put_bytes(int8_t* to, Ints v) {  // compilers expand one conversion from 32 to 8 bits badly
  auto narrow = __builtin_convertvector(__builtin_convertvector((Words)v, Halves), Quarters);
  std::memcpy(to, &narrow, sizeof narrow);
}

// To each sum, the products of four bytes w of int8 weights and four signed bytes x are added. A byte
// stands for the weight plus 128. Each sum is too large by ZERO times the sum of x, which the caller
// subtracts.
#if defined(GPT_AVX512)
constexpr float ZERO = 128;
inline Ints dot_int8(Ints sums, Bytes w, const int8_t* x) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w, load<__m512i>(x));
}
#elif defined(GPT_AVX2) && defined(__AVXVNNI__)
constexpr float ZERO = 128;
inline Ints dot_int8(Ints sums, Bytes w, const int8_t* x) {
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)w, load<__m256i>(x));
}
#elif defined(GPT_AVX2)
constexpr float ZERO = 0;
inline Ints dot_int8(Ints sums, Bytes w, const int8_t* x) {
  // vpmaddubsw saturates its sums of two products; those of |w| <= 128 and |x| <= 127 are below 2^15
  __m256i numbers = load<__m256i>(x), weights = _mm256_xor_si256((__m256i)w, _mm256_set1_epi8(-128));
  __m256i pairs =
      _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(numbers, weights));
  return sums + (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#elif defined(GPT_NEON)
constexpr float ZERO = 0;
inline Ints dot_int8(Ints sums, Bytes w, const int8_t* x) {
  return (Ints)vdotq_s32((int32x4_t)sums, (int8x16_t)(w ^ 128), vld1q_s8(x));
}
#else
constexpr float ZERO = 128;
inline Ints dot_int8(Ints sums, Bytes w, const int8_t* x) {
  for (int i = 0; i < WIDTH; i++) sums[i / 4] += int32_t(w[i]) * int32_t(x[i]);
  return sums;
}
#endif

// The products of int4 weights, bytes from 0 to 15: four of `a` and x, and four of `b` and y.
inline Ints dot_int4(Bytes a, const int8_t* x, Bytes b, const int8_t* y) {
#if defined(GPT_AVX2) && !defined(__AVXVNNI__)
  __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)a, load<__m256i>(x)),
                                   _mm256_maddubs_epi16((__m256i)b, load<__m256i>(y)));
  return (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#elif defined(GPT_NEON)
  return dot_int8(dot_int8(Ints{}, a ^ 128, x), b ^ 128, y);
#else
  return dot_int8(dot_int8(Ints{}, a, x), b, y);
#endif
}

// Numbers of bfloat16, one for every four lanes.
inline Floats spread(const uint16_t* from) {
#if defined(GPT_AVX512)
  // the upper halves of float32s; the lower are 0
  const __m128i first = _mm_set_epi8(1, 0, -1, -1, 1, 0, -1, -1, 1, 0, -1, -1, 1, 0, -1, -1);
  const __m512i which = _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_set_m128i(
          _mm_add_epi8(first, _mm_set1_epi32(0x02020000)), first)),
      _mm256_set_m128i(_mm_add_epi8(first, _mm_set1_epi32(0x06060000)),
                       _mm_add_epi8(first, _mm_set1_epi32(0x04040000))),
      1);
  return (Floats)_mm512_shuffle_epi8(_mm512_set1_epi64(load<int64_t>(from)), which);
#elif defined(GPT_AVX2)
  const __m128i first = _mm_set_epi8(1, 0, -1, -1, 1, 0, -1, -1, 1, 0, -1, -1, 1, 0, -1, -1);
  const __m256i which =
      _mm256_set_m128i(_mm_add_epi8(first, _mm_set1_epi32(0x02020000)), first);
  return (Floats)_mm256_shuffle_epi8(_mm256_set1_epi32(load<int32_t>(from)), which);
#else
  Floats all;
  for (int i = 0; i < LANES; i++) all[i] = number(from[i / 4]);
  return all;
#endif
}

// The same of float16.
inline Floats spread(const Float16* from) {
#if defined(GPT_AVX512)
  const __m512i which = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  __m128 four = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  return (Floats)_mm512_permutexvar_ps(which, _mm512_castps128_ps512(four));
#elif defined(GPT_AVX2) && defined(__F16C__)
  const __m128i which = _mm_set_epi8(3, 2, 3, 2, 3, 2, 3, 2, 1, 0, 1, 0, 1, 0, 1, 0);
  return (Floats)_mm256_cvtph_ps(_mm_shuffle_epi8(_mm_set1_epi32(load<int32_t>(from)), which));
#else
  Floats all;
  for (int i = 0; i < LANES; i++) all[i] = number(from[i / 4]);
  return all;
#endif
}

// Of the last groups of a row, fewer than a vector has: their bytes, and their numbers spread; zeros
// follow.
inline Bytes load_some(const uint8_t* from, long groups) {
#if defined(GPT_AVX512)
  return (Bytes)_mm512_maskz_loadu_epi32(__mmask16((1 << 4 * groups) - 1), from);
#else
  Bytes v = {};
  std::memcpy(&v, from, std::min(groups * HALF, WIDTH));
  return v;
#endif
}

template <class Scale>
inline Floats spread_some(const Scale* from, long groups) {
  Scale all[WIDTH / HALF] = {};
#if defined(GPT_AVX512)  // a copy of one number after the other would make the next load wait for it
  _mm_storel_epi64(reinterpret_cast<__m128i*>(all),
                   _mm_maskz_loadu_epi16(__mmask8((1 << groups) - 1), from));
#else
  std::copy_n(from, std::min(groups, WIDTH / HALF), all);
#endif
  return spread(all);
}

// What a bfloat16 matrix is multiplied with.
#if defined(__AVX512BF16__) && defined(GPT_AVX512)
using Half = uint16_t;
#else
using Half = float;
#endif

// Rows of activations as a matrix wants them: for bfloat16 rounded to it, or, where the processor
// does not multiply it, float32; for int8 and int4 signed bytes, with a scale for each GROUP. Of CHUNK
// bytes, the first halves of the four groups come first, and then the second ones.
struct Activations {
  struct Line {
    alignas(64) uint8_t bytes[64];
  };
  std::vector<Line> memory;  // a vector that crosses two of the cache's lines takes twice as long
  Half* halves = nullptr;    // [M, n], in it

  long K = 0;                  // padded
  std::vector<int8_t> values;  // [M, K]
  std::vector<float> scales;   // [M, K / 8], each group's four times
  std::vector<float> sums;     // [M, K / GROUP], of the numbers that the values stand for
  std::vector<float> totals;   // [M], of the sums

  void round(const float* x, long M, long n) {
    memory.resize((M * n * sizeof(Half) + sizeof(Line) - 1) / sizeof(Line));
    halves = reinterpret_cast<Half*>(memory.data());
    for (long m = 0; m < M; m++) round(x + m * n, n, halves + m * n);
  }

  static void round(const float* x, long n, uint16_t* out) {
    for (long i = 0; i < n; i += LANES) {
      Floats v = {};
      std::memcpy(&v, x + i, std::min(LANES, n - i) * sizeof(float));
      put(out + i, v, std::min(LANES, n - i));
    }
  }

  static void round(const float* x, long n, float* out) {  // in the order of bfloat16's two halves
    long k = 0;
    for (; k + 2 * LANES <= n; k += 2 * LANES)
      for (long i = 0; i < LANES; i++)
        out[k + i] = x[k + 2 * i], out[k + LANES + i] = x[k + 2 * i + 1];
    std::copy(x + k, x + n, out + k);
  }

  void quantise(const float* x, long M, long n) {
    K = padded(n);
    values.resize(M * K), scales.resize(M * K / 8), sums.resize(M * K / GROUP);
    totals.assign(M, 0);
    float group[GROUP];
    for (long m = 0; m < M; m++)
      for (long start = 0; start < K; start += GROUP) {
        long at = m * K + start, size = std::clamp(n - start, 0L, GROUP);
        const float* from = x + m * n + start;
        if (size < GROUP) {
          std::fill_n(std::copy_n(from, size, group), GROUP - size, 0.0f);
          from = group;
        }
        int8_t* to = &values[at - start % CHUNK + start % CHUNK / 2];
        totals[m] += sums[at / GROUP] = quantise(from, to, &scales[at / 8]);
      }
  }

  static float quantise(const float* from, int8_t* values, float* scales) {
    Floats larger = {};
    for (long i = 0; i < GROUP; i += LANES) {
      Floats v = floats(from + i), absolute = v < 0 ? -v : v;
      larger = absolute > larger ? absolute : larger;
    }
    float largest = 0;
    for (int i = 0; i < LANES; i++) largest = larger[i] > largest ? larger[i] : largest;
    float inverse = largest > 0 ? 127 / largest : 0;
    Words total = {};  // of what is not finite it means nothing, and may overflow
    Ints all = Ints{} - 1;
    for (long i = 0; i < GROUP; i += LANES) {
      Floats v = floats(from + i);
      // the last bits of a number of this size are a whole number
      Ints rounded = (Ints)(v * inverse + 0x1.8p23f) - 0x4b400000;
      put_bytes(values + i / HALF * CHUNK / 2 + i % HALF, rounded);
      total += (Words)rounded, all &= v == v;
    }
    uint32_t added = 0;
    int32_t numbers = -1;
    for (int i = 0; i < LANES; i++) added += total[i], numbers &= all[i];
    float scale = numbers ? largest / 127 : NAN;
    for (int i = 0; i < GROUP / 8; i++) scales[i] = scale;
    return scale * float(int32_t(added));
  }
};

// To each sum, the product of two floats, or those of two pairs of bfloat16, is added.
inline Floats dot(Floats sums, Floats a, Floats b) { return sums + a * b; }

#if defined(__AVX512BF16__) && defined(GPT_AVX512)
inline Floats dot(Floats sums, Pairs a, Pairs b) {
  return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
}
#endif

// Two vectors of consecutive numbers; or one of bfloat16, its even and its odd numbers apart.
template <class Vector, class Number>
inline void two(const Number* from, Vector (&out)[2]) {
  if constexpr (sizeof(Number) == 2 && std::is_same_v<Vector, Floats>) {
    Words both = load<Words>(from);
    out[0] = (Floats)(both << 16), out[1] = (Floats)(both & 0xffff0000);
  } else {
    out[0] = load<Vector>(from), out[1] = load<Vector>(from + WIDTH / sizeof(Number));
  }
}

// Ask for the weights to come, which helps where the registers are narrow: many loads are then in
// flight before the processor's own prefetcher sees where they go. Past the end it does no harm.
template <int M>
inline void fetch(const void* weights) {
  if (M == 1 && WIDTH < 64) __builtin_prefetch(static_cast<const char*>(weights) + AHEAD);
}

// A loop over rows whose sums stay in registers: where GCC does not unroll it at once, it keeps them in
// memory, which takes twice as long.
#define UNROLL _Pragma("GCC unroll 16")

// To y [R, M], what products leaves out: the numbers from k on.
template <int R, int M, class Weight, class Number>
void add_rest(const Weight* rows, const Number* x, long k, long K, float* y) {
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      float rest = 0;
      for (long i = k; i < K; i++)
        rest = std::fma(number(rows[r * K + i]), number(x[m * K + i]), rest);
      y[r * M + m] += rest;
    }
}

// A function of its own: inlined into others, GCC finds no registers for its 2 R M sums.
#if defined(GPT_AVX512)
#define ALONE __attribute__((noinline))
#else
#define ALONE inline
#endif

// M rows x [M, K] times R rows of weights: y [R, M]. A sum has one order whatever M is.
template <int R, int M, class Weight, class Number>
ALONE void products(const Weight* rows, const Number* x, long K, float* y) {
  using Vector = std::conditional_t<sizeof(Number) == 2, Pairs, Floats>;
  constexpr long STEP = 2 * WIDTH / sizeof(Number);
  Floats even[R][M], odd[R][M];
  UNROLL
  for (int r = 0; r < R; r++)
    UNROLL
    for (int m = 0; m < M; m++) even[r][m] = odd[r][m] = Floats{};
  long k = 0;
  for (; k + STEP <= K; k += STEP) {
    Vector w[R][2];
    UNROLL
    for (int r = 0; r < R; r++) two(rows + r * K + k, w[r]);
    fetch<M>(rows + k);
    UNROLL
    for (int m = 0; m < M; m++) {
      Vector v[2];
      two(x + m * K + k, v);
      UNROLL
      for (int r = 0; r < R; r++) {
        even[r][m] = dot(even[r][m], w[r][0], v[0]);
        odd[r][m] = dot(odd[r][m], w[r][1], v[1]);
      }
    }
  }
  UNROLL
  for (int r = 0; r < R; r++) {
    Floats total[M];  // the sums themselves have no address, so that they stay in registers
    UNROLL
    for (int m = 0; m < M; m++) total[m] = even[r][m] + odd[r][m];
    sums<M>(total, y + r * M);
  }
  if (k < K) add_rest<R, M>(rows, x, k, K, y);
}

// A row of int8 times M rows of activations: vectors whose sums, times the row's scale, are the
// products. A byte w stands for (w - 128) * scale.
template <int M>
inline void products_int8(const uint8_t* row, const Activations& x, long first, Floats* out) {
  const size_t K = x.K;
  const int8_t* values = &x.values[first * K];
  const float* scales = &x.scales[first * K / 8];
  Floats total[M] = {};
  for (size_t k = 0; k < K; k += CHUNK)
    for (size_t i = k; i < k + CHUNK / 2; i += WIDTH) {
      Bytes a = load<Bytes>(row + i), b = load<Bytes>(row + i + CHUNK / 2);
      fetch<M>(row + k + 2 * (i - k));
      UNROLL
      for (size_t m = 0; m < M; m++) {
        const int8_t* v = values + m * K + i;
        Ints sums = dot_int8(dot_int8(Ints{}, a, v), b, v + CHUNK / 2);
        total[m] += __builtin_convertvector(sums, Floats) *
                    floats(scales + m * K / 8 + k / 8 + (i - k) / 4);
      }
    }
  UNROLL
  for (size_t m = 0; m < M; m++) out[m] = total[m];
}

// What the groups of a row are multiplied with besides the scales: to M totals, `factor` times the
// row's numbers for its G groups, times the groups' sums of activations, is added.
template <int M, class Number>
inline void add_sums(const Number* row, float factor, const Activations& x, long first, size_t G,
                     Floats* total) {
  const size_t all = x.K / GROUP;
  const float* sums = &x.sums[first * all];
  size_t g = 0;
  for (; g + LANES <= G; g += LANES)
    UNROLL
    for (size_t m = 0; m < M; m++)
      total[m] += factor * floats(row + g) * floats(sums + m * all + g);
  for (; g < G; g += 4)
    UNROLL
    for (size_t m = 0; m < M; m++) {
      Floats four = {};
      for (size_t i = 0; i < std::min<size_t>(4, G - g); i++)
        four[i] = factor * number(row[g + i]) * sums[m * all + g + i];
      total[m] += four;
    }
}

// A row of int8 with a scale for each of its G groups. Its last chunk may have fewer than four groups.
template <int M>
inline void products_int8(const uint8_t* row, const Float16* scales, const Activations& x, long first,
                          size_t G, Floats* out) {
  const size_t K = x.K;
  const int8_t* values = &x.values[first * K];
  const float* steps = &x.scales[first * K / 8];
  Floats total[M] = {};
  auto add = [&](size_t k, size_t i, Bytes a, Bytes b, Floats scale) {
    UNROLL
    for (size_t m = 0; m < M; m++) {
      const int8_t* v = values + m * K + k + i;
      Ints sums = dot_int8(dot_int8(Ints{}, a, v), b, v + CHUNK / 2);
      total[m] += __builtin_convertvector(sums, Floats) *
                  (scale * floats(steps + m * K / 8 + k / 8 + i / 4));
    }
  };
  size_t k = 0;
  for (; k + CHUNK <= G * GROUP; k += CHUNK)
    for (size_t i = 0; i < CHUNK / 2; i += WIDTH) {
      fetch<M>(row + k + 2 * i);
      add(k, i, load<Bytes>(row + k + i), load<Bytes>(row + k + i + CHUNK / 2),
          spread(scales + k / GROUP + i / HALF));
    }
  size_t rest = G - k / GROUP;
  for (size_t i = 0; i < rest * HALF; i += WIDTH) {
    size_t g = i / HALF;
    add(k, i, load_some(row + k + i, rest - g), load_some(row + k + rest * HALF + i, rest - g),
        spread_some(scales + k / GROUP + g, rest - g));
  }
  if (ZERO != 0) add_sums<M>(scales, -ZERO, x, first, G, total);
  UNROLL
  for (size_t m = 0; m < M; m++) out[m] = total[m];
}

// A row of int4. The 16 bytes of a group have its first 16 weights in their lower halves. A weight w
// stands for low + w * scale, with one of each for every group.
template <int M, class Scale>
inline void products_int4(const uint8_t* row, const Scale* scales, const Scale* lows,
                          const Activations& x, long first, size_t G, Floats* out) {
  const size_t K = x.K;
  const int8_t* values = &x.values[first * K];
  const float* steps = &x.scales[first * K / 8];
  Floats total[M] = {};
  auto add = [&](size_t k, size_t i, Bytes both, Floats scale) {
    Bytes a = both & 15, b = both >> 4;
    UNROLL
    for (size_t m = 0; m < M; m++) {
      const int8_t* v = values + m * K + k + i;
      Ints sums = dot_int4(a, v, b, v + CHUNK / 2);
      total[m] += __builtin_convertvector(sums, Floats) *
                  (scale * floats(steps + m * K / 8 + k / 8 + i / 4));
    }
  };
  size_t k = 0;
  for (; k + CHUNK <= G * GROUP; k += CHUNK)
    for (size_t i = 0; i < CHUNK / 2; i += WIDTH) {
      fetch<M>(row + k / 2 + i);
      add(k, i, load<Bytes>(row + k / 2 + i), spread(scales + k / GROUP + i / HALF));
    }
  size_t rest = G - k / GROUP;
  for (size_t g = 0; g < rest; g += WIDTH / HALF)
    add(k, g * HALF, load_some(row + k / 2 + g * HALF, rest - g),
        spread_some(scales + k / GROUP + g, rest - g));
  add_sums<M>(lows, 1, x, first, G, total);
  UNROLL
  for (size_t m = 0; m < M; m++) out[m] = total[m];
}

// The groups of a row.
inline size_t groups(const Matrix& matrix) {
  long K = matrix.format >= 4 ? matrix.K + GROUP - 1 : padded(matrix.K);
  return K / GROUP;
}

// What a product is put into, or added to: y [M, N].
struct Product {
  const Matrix& matrix;
  float* y;
  bool add;

  // Rows n .. n + R - 1 of the matrix times rows first .. first + M - 1 of x: `row` gives [R, M].
  template <int R, int M, class Rows>
  void put(long n, long first, Rows rows) const {
    float out[R * M];
    rows(n, out);
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++) {
        float& sum = y[(first + m) * matrix.N + n + r];
        sum = (add ? sum : 0) + out[r * M + m] + (matrix.bias ? matrix.bias[n + r] : 0);
      }
  }

  // The same for the first `size` rows from n on, times one row of x.
  void put(long n, long m, Floats sums, long size) const {
    float* to = y + m * matrix.N + n;
    Floats before = {}, bias = {};
    if (add) std::memcpy(&before, to, size * sizeof(float));
    if (matrix.bias) std::memcpy(&bias, matrix.bias + n, size * sizeof(float));
    ::put(to, before + sums + bias, size);
  }
};

// Rows of floating point: R of them meet the same activations while these are in registers.
template <int M, class Weight, class Number>
void sweep_floats(const Product& product, const Weight* weights, long begin, long end, long first,
                  const Number* x) {
  // one token waits for the memory, in its order; more have 2 R M sums in registers
  constexpr int R = M == 1 || REGISTERS < 32 ? 1 : 3;
  long K = product.matrix.K, n = begin;
  for (; n + R <= end; n += R)
    product.put<R, M>(n, first, [=](long n, float* out) {
      products<R, M>(weights + n * K, x + first * K, K, out);
    });
  for (; n < end; n++)
    product.put<1, M>(n, first, [=](long n, float* out) {
      products<1, M>(weights + n * K, x + first * K, K, out);
    });
}

// Rows of int8 or int4: for one token the vectors of four rows are added up together.
template <int M, class Finish, class Rows>
void sweep_packed(const Product& product, long begin, long end, long first, Finish finish,
                  Rows rows) {
  auto some = [&](auto R, long n) {
    product.put<R.value, M>(n, first, [&](long n, float* out) {
      Floats total[R.value * M];
      for (int r = 0; r < R.value; r++) rows(n + r, total + r * M);
      sums<R.value * M>(total, out);
      for (int i = 0; i < R.value * M; i++) out[i] = finish(n + i / M, i % M, out[i]);
    });
  };
  constexpr int R = M == 1 ? 4 : 1;
  long n = begin;
  for (; n + R <= end; n += R) some(std::integral_constant<int, R>(), n);
  for (; n < end; n++) some(std::integral_constant<int, 1>(), n);
}

template <int M>
void sweep(const Product& product, long begin, long end, long first, const float* x,
           const Activations& q) {
  const Matrix& matrix = product.matrix;
  auto bytes = static_cast<const uint8_t*>(matrix.weights);
  auto halves = static_cast<const uint16_t*>(matrix.weights);
  auto itself = [](long, int, float sum) { return sum; };
  size_t G = groups(matrix);
  auto int4 = [&](auto scales, auto lows) {
    sweep_packed<M>(product, begin, end, first, itself, [=, &q](long n, Floats* out) {
      products_int4<M>(bytes + n * G * HALF, scales + n * G, lows + n * G, q, first, G, out);
    });
  };
  if (matrix.format == 0) {
    sweep_floats<M>(product, static_cast<const float*>(matrix.weights), begin, end, first, x);
  } else if (matrix.format == 1) {
    sweep_floats<M>(product, halves, begin, end, first, q.halves);
  } else if (matrix.format == 2) {
    auto scales = static_cast<const float*>(matrix.scales);
    auto finish = [=, &q](long n, int m, float sum) {
      return scales[n] * (sum - ZERO * q.totals[first + m]);
    };
    sweep_packed<M>(product, begin, end, first, finish, [=, &q](long n, Floats* out) {
      products_int8<M>(bytes + n * q.K, q, first, out);
    });
  } else if (matrix.format == 3) {
    int4(static_cast<const uint16_t*>(matrix.scales), static_cast<const uint16_t*>(matrix.lows));
  } else if (matrix.format == 4) {
    auto scales = static_cast<const Float16*>(matrix.scales);
    sweep_packed<M>(product, begin, end, first, itself, [=, &q](long n, Floats* out) {
      products_int8<M>(bytes + n * G * GROUP, scales + n * G, q, first, G, out);
    });
  } else {
    int4(static_cast<const Float16*>(matrix.scales), static_cast<const Float16*>(matrix.lows));
  }
}

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(GPT_AVX512) && defined(__linux__)
#define GPT_AMX
constexpr int TILE = 16;  // rows of a tile register, which has 64 bytes in each

// Whether the system lets this process use the tile registers.
bool has_tiles() {
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  static const bool has = !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
  return has;
}

inline void transpose(Floats (&v)[TILE]) {
  const Ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int size = TILE / 2; size; size /= 2) {  // swap two of the four quarters of each square
    Ints upper = (lane & size) != 0;  // -1 where it is
    Ints first = lane + (upper & (TILE - size)), second = lane + size + (upper & (TILE - size));
    for (int i = 0; i < TILE; i++)
      if (!(i & size)) {
        __m512 a = (__m512)v[i], b = (__m512)v[i + size];
        v[i] = (Floats)_mm512_permutex2var_ps(a, (__m512i)first, b);
        v[i + size] = (Floats)_mm512_permutex2var_ps(a, (__m512i)second, b);
      }
  }
}

// Rows begin .. end - 1 of a bfloat16 matrix times M rows of activations, by tiles: a tile of 16 rows
// of the matrix, 32 numbers of each, times one of 16 rows of activations, transposed in pairs. Up to
// two of each meet at once. All numbers of rows take this path, so that a row's product does not depend on
// the others: 4 rows take about half the time of the vectors' path, 16 rows a third; one row takes as long
// where the matrix comes from memory, and a quarter longer where it is in the processor's cache.
void multiply_tiles(const Product& product, long begin, long end, long M, const uint16_t* x) {
  struct alignas(64) Shapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  };
  const Matrix& matrix = product.matrix;
  long K = matrix.K, steps = K / (2 * TILE), size = TILE * 2 * TILE;
  static thread_local std::vector<uint16_t> pairs;  // [M / 16, K / 32, 16, 16, 2]
  pairs.resize((M + TILE - 1) / TILE * steps * size);
  uint16_t* to = pairs.data();
  for (long first = 0; first < M; first += TILE)
    for (long k = 0; k < K; k += 2 * TILE, to += size) {
      Floats v[TILE] = {};
      for (long m = first; m < std::min<long>(M, first + TILE); m++)
        v[m - first] = load<Floats>(x + m * K + k);
      transpose(v);
      std::memcpy(to, v, sizeof v);
    }
  auto weights = static_cast<const uint16_t*>(matrix.weights);
  long last_rows = 0, last_count = 0;
  for (long n = begin; n < end; n += 2 * TILE)
    for (long first = 0; first < M; first += 2 * TILE) {
      long rows = std::min<long>(2 * TILE, end - n), count = std::min<long>(2 * TILE, M - first);
      if (rows != last_rows || count != last_count) {
        Shapes shapes;
        auto shape = [&](int tile, long rows, long bytes) {
          shapes.rows[tile] = rows, shapes.bytes[tile] = bytes;
        };
        for (int i = 0; i < 2; i++) {
          long its_rows = std::clamp<long>(rows - i * TILE, 1, TILE);
          shape(4 + i, its_rows, 4 * TILE);
          for (int j = 0; j < 2; j++) {
            long its_count = std::clamp<long>(count - j * TILE, 1, TILE);
            shape(2 * i + j, its_rows, 4 * its_count), shape(6 + j, TILE, 4 * its_count);
          }
        }
        _tile_loadconfig(&shapes);
        last_rows = rows, last_count = count;
      }
      bool below = rows > TILE, beside = count > TILE;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      const uint16_t *upper = weights + n * K, *lower = upper + TILE * K;
      const uint16_t *left = &pairs[first * K], *right = left + TILE * K;
      for (long step = 0; step < steps; step++) {
        _tile_loadd(4, upper + step * 2 * TILE, 2 * K);
        _tile_loadd(6, left + step * size, 4 * TILE);
        _tile_dpbf16ps(0, 4, 6);
        if (beside) {
          _tile_loadd(7, right + step * size, 4 * TILE);
          _tile_dpbf16ps(1, 4, 7);
        }
        if (below) {
          _tile_loadd(5, lower + step * 2 * TILE, 2 * K);
          _tile_dpbf16ps(2, 5, 6);
          if (beside) _tile_dpbf16ps(3, 5, 7);
        }
      }
      alignas(64) float out[4][TILE][TILE] = {};
      _tile_stored(0, out[0], 4 * TILE);
      if (beside) _tile_stored(1, out[1], 4 * TILE);
      if (below) _tile_stored(2, out[2], 4 * TILE);
      if (below && beside) _tile_stored(3, out[3], 4 * TILE);
      for (long i = 0; i < rows; i += TILE)
        for (long j = 0; j < count; j += TILE) {
          Floats v[TILE];
          std::memcpy(v, out[i / TILE * 2 + j / TILE], sizeof v);
          transpose(v);
          for (long m = j; m < std::min<long>(count, j + TILE); m++)
            product.put(n + i, first + m, v[m - j], std::min<long>(TILE, rows - i));
        }
    }
  _tile_release();
}
#endif

using Sweep = void (*)(const Product&, long, long, long, const float*, const Activations&);
constexpr Sweep SWEEPS[] = {nullptr, sweep<1>, sweep<2>, sweep<3>, sweep<4>};

// This thread's part of y [M, N] = x [M, K] times the matrix, plus its bias; or added to y.
void multiply(const Matrix& matrix, long M, const float* x, float* y, bool add = false) {
  static thread_local Activations q;
  if (matrix.format == 1) q.round(x, M, matrix.K);
  if (matrix.format >= 2) q.quantise(x, M, matrix.K);
  Share own(matrix.N);
#if defined(GPT_AMX)
  if (matrix.format == 1 && matrix.K % (2 * TILE) == 0 && has_tiles())
    return multiply_tiles({matrix, y, add}, own.begin, own.end, M, q.halves);
#endif
  for (long n = own.begin; n < own.end; n += BLOCK)  // it stays in the processor's cache
    for (long first = 0; first < M; first += AT_ONCE)
      SWEEPS[std::min<long>(AT_ONCE, M - first)]({matrix, y, add}, n, std::min(n + BLOCK, own.end),
                                                 first, x, q);
}

// A row of K numbers of a matrix of integers as they are multiplied with; G groups, each with a scale
// and a low, or the row with a scale.
template <class Number, class Scale>
void dense_int8(const uint8_t* row, const Scale* scales, bool by_group, long G, long K, Number* out) {
  for (long k = 0; k < K; k += HALF) {
    long in_chunk = std::min(CHUNK / GROUP, G - k / CHUNK * CHUNK / GROUP), g = k % CHUNK / GROUP;
    const uint8_t* bytes = row + k - k % CHUNK + (k % GROUP / HALF * in_chunk + g) * HALF;
    float numbers[HALF], scale = number(scales[by_group ? k / GROUP : 0]);
    for (long i = 0; i < HALF; i++) numbers[i] = float(int32_t(bytes[i]) - 128) * scale;
    put_half(out + k, numbers, K - k);
  }
}

template <class Number, class Scale>
void dense_int4(const uint8_t* row, const Scale* scales, const Scale* lows, long K, Number* out) {
  for (long k = 0; k < K; k += HALF) {
    const uint8_t* bytes = row + k / GROUP * HALF;
    float numbers[HALF], scale = number(scales[k / GROUP]), low = number(lows[k / GROUP]);
    int shift = k % GROUP ? 4 : 0;
    for (long i = 0; i < HALF; i++)
      numbers[i] = low + float(int32_t(bytes[i]) >> shift & 15) * scale;
    put_half(out + k, numbers, K - k);
  }
}

template <class Number>
void dense(const Matrix& matrix, Number* out) {
  long N = matrix.N, K = matrix.K, G = groups(matrix);
  auto bytes = static_cast<const uint8_t*>(matrix.weights);
  auto int8 = [=](long n, auto scales, long step) {
    dense_int8(bytes + n * G * GROUP, scales + n * step, step > 1, G, K, out + n * K);
  };
  auto int4 = [=](long n, auto scales, auto lows) {
    dense_int4(bytes + n * G * HALF, scales + n * G, lows + n * G, K, out + n * K);
  };
#pragma omp parallel for schedule(static) if (N * K > SMALL)
  for (long n = 0; n < N; n++) {
    if (matrix.format == 2)
      int8(n, static_cast<const float*>(matrix.scales), 1);
    else if (matrix.format == 3)
      int4(n, static_cast<const uint16_t*>(matrix.scales), static_cast<const uint16_t*>(matrix.lows));
    else if (matrix.format == 4)
      int8(n, static_cast<const Float16*>(matrix.scales), G);
    else
      int4(n, static_cast<const Float16*>(matrix.scales), static_cast<const Float16*>(matrix.lows));
  }
}

// The sum of f(x[i]).
template <class Function>
float add_up(const float* x, long n, Function f) {
  Floats sums = {};
  long i = 0;
  for (; i + LANES <= n; i += LANES) sums += f(floats(x + i));
  float total = sum(sums);
  for (; i < n; i++) total += f(x[i]);
  return total;
}

// Each row of x [M, C], made to have the mean 0 and the variance 1 (LayerNorm), or the mean square 1
// (RMSNorm).
void normalise(const Norm& norm, const float* __restrict x, long M, long C, float* __restrict out) {
  for (long m = 0; m < M; m++, x += C, out += C) {
    if (norm.kind == 2) {
      float square = add_up(x, C, [](auto v) { return v * v; }) / float(C);
      float scale = 1 / std::sqrt(square + float(norm.epsilon));
      for (long c = 0; c < C; c++) out[c] = x[c] * scale;
      if (norm.weight)
        for (long c = 0; c < C; c++) out[c] *= norm.weight[c];
      if (norm.bias)
        for (long c = 0; c < C; c++) out[c] += norm.bias[c];
      continue;
    }
    float mean = add_up(x, C, [](auto v) { return v; }) / float(C);
    float variance = add_up(x, C, [=](auto v) { return (v - mean) * (v - mean); }) / float(C);
    float scale = 1 / std::sqrt(variance + float(norm.epsilon));
    if (norm.weight)
      for (long c = 0; c < C; c++) out[c] = (x[c] - mean) * scale * norm.weight[c];
    else
      for (long c = 0; c < C; c++) out[c] = (x[c] - mean) * scale;
    if (norm.bias)
      for (long c = 0; c < C; c++) out[c] += norm.bias[c];
  }
}

template <class Function>
void each(float* x, long n, Function function) {
  for (; n > 0; x += LANES, n -= LANES) {
    Floats v = {};
    long size = std::min(n, LANES) * sizeof(float);
    std::memcpy(&v, x, size);
    v = function(v);
    std::memcpy(x, &v, size);
  }
}

void activate(long kind, float* x, long n) {
  auto sigmoid = [](Floats v) { return 1 / (1 + exponential(-v)); };
  if (kind == 0)  // GELU by tanh, which is a sigmoid of twice its argument
    each(x, n, [=](Floats v) {
      return v * sigmoid(1.5957691216f * (v + 0.044715f * v * v * v));
    });
  else if (kind == 1)  // GELU
    for (long i = 0; i < n; i++) x[i] *= 0.5f * (1 + erff(x[i] * 0.70710678f));
  else if (kind == 2)  // ReLU
    each(x, n, [](Floats v) { return v < 0 ? Floats{} : v; });
  else if (kind == 3)  // SiLU
    each(x, n, [=](Floats v) { return v * sigmoid(v); });
  else if (kind == 4)  // tanh
    for (long i = 0; i < n; i++) x[i] = tanhf(x[i]);
  else  // ReLU squared
    each(x, n, [](Floats v) { return v < 0 ? Floats{} : v * v; });
}

// N sums of D / LANES products each: a query times N keys.
template <int N, class Number>
inline void scores(const float* q, const Number* keys, long D, float* out) {
  Floats products[N] = {};
  for (long d = 0; d < D; d += LANES)
    for (int n = 0; n < N; n++) products[n] += floats(q + d) * floats(keys + n * D + d);
  sums<N>(products, out);
}

// To N vectors of the output, values times their weights are added.
template <int N, class Number>
inline void weigh(const float* weights, const Number* values, long S, long D, float* out) {
  Floats sums[N];
  for (int n = 0; n < N; n++) sums[n] = floats(out + n * LANES);
  for (long s = 0; s < S; s++)
    for (int n = 0; n < N; n++) sums[n] += weights[s] * floats(values + s * D + n * LANES);
  for (int n = 0; n < N; n++) put(out + n * LANES, sums[n]);
}

// The D numbers of a key or value go into the cache, int8 with their scale, as gpt/model/store.py
// rounds them.
template <class Number>
inline void keep(const float* from, long D, Number* to, float*) {
  for (long d = 0; d < D; d += LANES) put(to + d, floats(from + d));
}

inline void keep(const float* from, long D, int8_t* to, float* scale) {
  float largest = 0;
  for (long d = 0; d < D; d++) {
    float size = std::fabs(from[d]);
    largest = size > largest || size != size ? size : largest;  // NaN stays
  }
  *scale = largest / 127;
  for (long d = 0; d < D; d++) {
    float steps = *scale > 0 ? std::nearbyint(from[d] / *scale) : 0;
    to[d] = steps > -127 ? int8_t(std::min(steps, 127.0f)) : -127;
  }
}

// Keys of consecutive positions in consecutive slots.
struct Stretch {
  long slot, n, at;  // the position of the first
  bool sinks;
};

// A block of earlier keys for a block of queries, as gpt/model/masks.py draws it.
inline long drawn(long block, long number) {
  uint64_t mask = 0xffffffff;
  uint64_t mixed = (uint64_t(block) * 0x9E3779B1 + uint64_t(number + 1) * 0x85EBCA77) & mask;
  mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & mask;
  return long((mixed ^ (mixed >> 13)) % uint64_t(block + 1));
}

// What a query at a position sees: all keys before it; blocks of them; or its window, which may wrap
// in the ring, and the sinks.
inline void stretches(const Store& store, long at, std::vector<Stretch>& out) {
  out.clear();
  if (store.block) {
    static thread_local std::vector<long> blocks;
    long mine = at / store.block;
    blocks.clear();
    for (long n = 0; n < store.local && n <= mine; n++) blocks.push_back(mine - n);
    for (long n = 0; n < store.first && n <= mine; n++) blocks.push_back(n);
    for (long n = 0; n < store.random; n++) blocks.push_back(drawn(mine, n));
    std::sort(blocks.begin(), blocks.end());
    blocks.erase(std::unique(blocks.begin(), blocks.end()), blocks.end());
    for (long n : blocks) {
      long from = n * store.block;
      out.push_back({from, std::min(store.block, at + 1 - from), from, false});
    }
  } else if (!store.window) {
    out.push_back({0, at + 1, 0, false});
  } else {
    long ring = store.slots - store.sinks, sinks = store.sinks;
    long from = std::max(sinks, at - store.window + 1);
    if (sinks) out.push_back({0, std::min(sinks, at + 1), 0, true});
    while (from <= at) {
      long offset = (from - sinks) % ring, n = std::min(at + 1 - from, ring - offset);
      out.push_back({sinks + offset, n, from, false});
      from += n;
    }
  }
}

// Keys and values [slots, D] of one row and head, and their scales [slots], or null.
template <class Number>
struct Memory {
  Number *keys, *values;
  float *key_scales, *value_scales;

  Memory(const Store& store, long at, long D)  // at: the index of the first number
      : keys(static_cast<Number*>(store.keys) + at), values(static_cast<Number*>(store.values) + at),
        key_scales(store.key_scales ? store.key_scales + at / D : nullptr),
        value_scales(store.value_scales ? store.value_scales + at / D : nullptr) {}
};

// Numbers of the slots that a query sees are multiplied by the slots' scales.
inline void scale_by(const float* scales, const std::vector<Stretch>& seen, float* numbers) {
  for (const Stretch& stretch : seen) {
    for (long s = 0; s < stretch.n; s++) numbers[s] *= scales[stretch.slot + s];
    numbers += stretch.n;
  }
}

// One query's attention over the stretches of keys and values that it sees. Towards sinks the query
// is another one.
template <class Number>
void attend(const Layer& layer, long head, const float* query, const float* to_sinks,
            const Memory<Number>& memory, long at, long D, float* out) {
  static thread_local std::vector<float> weights, best;
  static thread_local std::vector<Stretch> seen;
  stretches(layer.store, at, seen);
  long S = 0, count = long(seen.size()), last = layer.store.sinks + layer.store.window - 1;
  for (const Stretch& stretch : seen) S += stretch.n;
  weights.resize(S);
  float scale = float(layer.scale), softcap = float(layer.softcap);
  float* to = weights.data();
  for (long i = 0; i < count; i++) {
    const Number* from = memory.keys + seen[i].slot * D;
    const float* q = seen[i].sinks ? to_sinks : query;
    long s = 0, n = seen[i].n;
    for (; s + 4 <= n; s += 4) scores<4>(q, from + s * D, D, to + s);
    for (; s < n; s++) scores<1>(q, from + s * D, D, to + s);
    to += n;
  }
  if (memory.key_scales) scale_by(memory.key_scales, seen, weights.data());
  if (softcap || layer.slopes) {
    to = weights.data();
    float slope = layer.slopes ? layer.slopes[head] : 0;
    for (long i = 0; i < count; to += seen[i].n, i++) {
      long mine = seen[i].sinks ? std::min(at, last) : at;
      for (long s = 0; s < seen[i].n; s++) {
        to[s] *= scale;
        if (softcap) to[s] = softcap * tanhf(to[s] / softcap);
        to[s] += slope * float(std::min(0L, seen[i].at + s - mine));
      }
    }
    scale = 1;
  }
  float largest = layer.sinks ? layer.sinks[head] : -INFINITY;
  Floats larger = Floats{} + largest;
  long whole = S - S % LANES;
  each(weights.data(), whole, [&](Floats v) {
    v *= scale;
    larger = v > larger ? v : larger;
    return v;
  });
  for (long s = whole; s < S; s++) {
    weights[s] *= scale;
    largest = weights[s] > largest ? weights[s] : largest;
  }
  for (int i = 0; i < LANES; i++) largest = larger[i] > largest ? larger[i] : largest;
  float least = -INFINITY;
  if (layer.top_k && layer.top_k < S + (layer.sinks ? 1 : 0)) {
    best.assign(weights.begin(), weights.begin() + S);
    if (layer.sinks) best.push_back(layer.sinks[head]);
    std::nth_element(best.begin(), best.begin() + layer.top_k - 1, best.end(), std::greater<float>());
    least = best[layer.top_k - 1];
    long room = layer.top_k;  // for what equals the least
    for (float score : best) room -= score > least;
    for (long s = 0; s < S; s++)
      if (weights[s] < least || (weights[s] == least && room-- <= 0)) weights[s] = -INFINITY;
  }
  each(weights.data(), S, [=](Floats v) { return exponential(v - largest); });
  if (layer.top_k)
    for (long s = 0; s < S; s++)
      if (weights[s] < 1e-37f) weights[s] = 0;
  float total = add_up(weights.data(), S, [](auto v) { return v; });
  if (layer.sinks && layer.sinks[head] >= least) total += std::exp(layer.sinks[head] - largest);
  if (memory.value_scales) scale_by(memory.value_scales, seen, weights.data());
  std::fill_n(out, D, 0.0f);
  const float* from = weights.data();
  for (long i = 0; i < count; from += seen[i].n, i++) {
    const Number* its = memory.values + seen[i].slot * D;
    long d = 0, n = seen[i].n;
    for (; d + 4 * LANES <= D; d += 4 * LANES) weigh<4>(from, its + d, n, D, out + d);
    for (; d < D; d += LANES) weigh<1>(from, its + d, n, D, out + d);
  }
  for (long d = 0; d < D; d += LANES) put(out + d, floats(out + d) / total);
}

// The cosines and sines of a token for one Rotary: of its key, its query, and its query to sinks.
struct Turned {
  std::vector<float> numbers;  // [6, pairs]

  Turned(const Rotary& rotary, long at) : numbers(6 * rotary.pairs) {
    put(rotary, at, true, 0);
    put(rotary, at, false, 2 * rotary.pairs);
    put(rotary, rotary.last < 0 ? at : std::min(at, rotary.last), false, 4 * rotary.pairs);
  }

 private:
  void put(const Rotary& rotary, long at, bool of_key, long start) {
    for (long i = 0; i < rotary.pairs; i++) {
      float angle = float(at) * rotary.turns[i], factor = float(rotary.factor);
      float decay = rotary.decay ? std::pow(rotary.decay[i], float(at) / 512) : 1;
      float cosine = factor * std::cos(angle), sine = factor * std::sin(angle);
      numbers[start + i] = of_key ? cosine / decay : cosine * decay;
      numbers[start + rotary.pairs + i] = of_key ? sine / decay : sine * decay;
    }
  }
};

// A head's query or key as attention takes it: normalised and rotated.
inline void prepare(const Norm& norm, const float* from, long D, const float* turned, long pairs,
                    float* out) {
  if (norm.kind) normalise(norm, from, 1, D, out);
  else std::copy_n(from, D, out);
  for (long i = 0; i < pairs; i++) {
    float first = out[i], second = out[pairs + i], cosine = turned[i], sine = turned[pairs + i];
    out[i] = first * cosine - second * sine;
    out[pairs + i] = second * cosine + first * sine;
  }
}

// This thread's part of the attention of M new tokens, qkv [M, H + 2 Hkv, D], to out [M, H, D]. Each
// token's keys and values are put at its slot in its row of the cache.
template <class Number>
void attention(const Shape& shape, const Layer& layer, const Token* tokens, long M,
               const std::vector<Turned>& turned, const float* qkv, float* out) {
  long H = shape.n_head, G = shape.kv_heads, D = shape.head_dim;
  const Store& store = layer.store;
  bool rotates = layer.rotary >= 0;
  long pairs = rotates ? shape.rotaries[layer.rotary].pairs : 0;
  auto angles = [&](long m) {
    return rotates ? turned[layer.rotary * M + m].numbers.data() : nullptr;
  };
  static thread_local std::vector<float> head, to_sinks;
  head.resize(D), to_sinks.resize(D);
  Share appending(M * G), own(M * H);
  for (long i = appending.begin; i < appending.end; i++) {
    long m = i / G, g = i % G, slot = tokens[m].at;
    if (store.window && slot >= store.sinks)
      slot = store.sinks + (slot - store.sinks) % (store.slots - store.sinks);
    long at = tokens[m].row * store.row_stride + g * store.head_stride + slot * D;
    const float *k = qkv + (m * (H + 2 * G) + H + g) * D, *v = k + G * D;
    prepare(layer.k_norm, k, D, angles(m), pairs, head.data());
    Memory<Number> memory(store, at, D);
    keep(head.data(), D, memory.keys, memory.key_scales);
    keep(v, D, memory.values, memory.value_scales);
  }
#pragma omp barrier
  for (long i = own.begin; i < own.end; i++) {
    long m = i / H, h = i % H;
    long at = tokens[m].row * store.row_stride + h / (H / G) * store.head_stride;
    const float* q = qkv + (m * (H + 2 * G) + h) * D;
    prepare(layer.q_norm, q, D, rotates ? angles(m) + 2 * pairs : nullptr, pairs, head.data());
    if (store.sinks)
      prepare(layer.q_norm, q, D, rotates ? angles(m) + 4 * pairs : nullptr, pairs, to_sinks.data());
    attend(layer, h, head.data(), to_sinks.data(), Memory<Number>(store, at, D), tokens[m].at, D,
           out + i * D);
  }
}

// Which tokens an expert takes, and the weight of each.
struct Load {
  std::vector<long> tokens;
  std::vector<float> weights;
};

// The experts of each of M tokens by the router's logits [M, E]; the shared ones take all.
std::vector<Load> route(const Layer& layer, const float* logits, long M) {
  long E = layer.n_expert;
  std::vector<Load> loads(E + layer.n_shared);
  std::vector<float> scores(E);
  std::vector<long> order(E);
  for (long m = 0; m < M; m++, logits += E) {
    float largest = *std::max_element(logits, logits + E), total = 0;
    for (long e = 0; e < E; e++) {
      scores[e] = layer.by_sigmoid ? 1 / (1 + std::exp(-logits[e])) : std::exp(logits[e] - largest);
      total += scores[e], order[e] = e;
    }
    if (!layer.by_sigmoid)
      for (float& score : scores) score /= total;
    auto value = [&](long e) { return scores[e] + (layer.preference ? layer.preference[e] : 0); };
    std::partial_sort(order.begin(), order.begin() + layer.n_active, order.end(),
                      [&](long a, long b) {
                        return value(a) != value(b) ? value(a) > value(b) : a < b;
                      });
    total = 0;
    for (long i = 0; i < layer.n_active; i++) total += scores[order[i]];
    for (long i = 0; i < layer.n_active; i++) {
      float weight = scores[order[i]] / (layer.renormalise ? total + 1e-20f : 1);
      loads[order[i]].tokens.push_back(m), loads[order[i]].weights.push_back(weight);
    }
    for (long e = E; e < E + layer.n_shared; e++)
      loads[e].tokens.push_back(m), loads[e].weights.push_back(1);
  }
  return loads;
}

// This thread's part of what is inside of a feed-forward layer: hidden [M, inner] of x [M, C].
void inside(const FeedForward& mlp, long activation, long M, const float* x, float* hidden,
            float* gates) {
  long inner = mlp.up.N;
  multiply(mlp.up, M, x, hidden);
  if (mlp.gate.weights) multiply(mlp.gate, M, x, gates);
  Share own(inner);
  for (long m = 0; m < M; m++) {
    float *up = hidden + m * inner, *gate = mlp.gate.weights ? gates + m * inner : up;
    activate(activation, gate + own.begin, own.end - own.begin);
    if (gate != up)
      for (long i = own.begin; i < own.end; i++) up[i] *= gate[i];
  }
}

}  // namespace

extern "C" {

// y [M, N] = x [M, K] times the matrix, plus its bias.
void gpt_linear(const Matrix* matrix, long M, const float* x, float* y) {
#pragma omp parallel if (matrix->N * matrix->K > SMALL)
  multiply(*matrix, M, x, y);
}

// out [N, K] of float32 or bfloat16 (halves), from a matrix of integers.
void gpt_dense(const Matrix* matrix, long halves, void* out) {
  if (halves) dense(*matrix, static_cast<uint16_t*>(out));
  else dense(*matrix, static_cast<float*>(out));
}

// The blocks for M new tokens, each of some row of the cache, which takes them: x [M, C] becomes what
// comes out.
void gpt_blocks(const Layer* layers, const Shape* shape, const Token* tokens, long M, float* x) {
  long C = layers->out.N, widest = 0, most = 1, experts = 1;
  for (long l = 0; l < shape->n_layer; l++) {
    widest = std::max(widest, layers[l].experts->up.N);
    most = std::max(most, layers[l].n_active + layers[l].n_shared);
    experts = std::max(experts, layers[l].n_expert);
  }
  std::vector<Turned> turned;
  for (long r = 0; r < shape->n_rotary; r++)
    for (long m = 0; m < M; m++) turned.emplace_back(shape->rotaries[r], tokens[m].at);
  std::vector<float> qkv(M * layers->qkv.N), heads(M * shape->n_head * shape->head_dim);
  std::vector<float> hidden(M * most * widest), gates(hidden.size()), added(M * C);
  std::vector<float> logits(M * experts);
#pragma omp parallel if (C * C > SMALL)
  {
    std::vector<float> normal(M * C), other(M * C), gathered(M * C), result(M * C);
    Share columns(C);
    // A branch's output, in `added` after a barrier, is normalised and goes into the stream.
    auto add_normalised = [&](const Norm& norm) {
      normalise(norm, added.data(), M, C, gathered.data());
      for (long m = 0; m < M; m++)
        for (long c = columns.begin; c < columns.end; c++) x[m * C + c] += gathered[m * C + c];
    };
    for (long l = 0; l < shape->n_layer; l++) {
      const Layer& layer = layers[l];
      normalise(layer.attn_norm, x, M, C, normal.data());
      if (shape->parallel && layer.mlp_norm.kind) normalise(layer.mlp_norm, x, M, C, other.data());
      multiply(layer.qkv, M, normal.data(), qkv.data());
#pragma omp barrier
      auto attend_by = shape->numbers == 0   ? attention<float>
                       : shape->numbers == 1 ? attention<uint16_t>
                                             : attention<int8_t>;
      attend_by(*shape, layer, tokens, M, turned, qkv.data(), heads.data());
#pragma omp barrier
      bool attn_norm = layer.attn_out_norm.kind, mlp_norm = layer.mlp_out_norm.kind;
      multiply(layer.out, M, heads.data(), attn_norm ? added.data() : x, !attn_norm);
#pragma omp barrier
      if (attn_norm) {
        add_normalised(layer.attn_out_norm);
#pragma omp barrier
      }
      if (!shape->parallel) normalise(layer.mlp_norm, x, M, C, normal.data());
      else if (layer.mlp_norm.kind) normal.swap(other);
      float* to = mlp_norm ? added.data() : x;
      if (!layer.n_expert) {
        inside(*layer.experts, shape->activation, M, normal.data(), hidden.data(), gates.data());
#pragma omp barrier
        multiply(layer.experts->down, M, hidden.data(), to, !mlp_norm);
      } else {
        multiply(layer.router, M, normal.data(), logits.data());
#pragma omp barrier
        std::vector<Load> loads = route(layer, logits.data(), M);
        auto each_expert = [&](auto function) {  // with the index of its first number
          long before = 0;
          for (size_t e = 0; e < loads.size(); before += loads[e].tokens.size(), e++)
            if (!loads[e].tokens.empty()) function(layer.experts[e], loads[e], before * widest);
        };
        each_expert([&](const FeedForward& mlp, const Load& load, long start) {
          for (size_t i = 0; i < load.tokens.size(); i++)
            std::copy_n(&normal[load.tokens[i] * C], C, &gathered[i * C]);
          inside(mlp, shape->activation, load.tokens.size(), gathered.data(), &hidden[start],
                 &gates[start]);
        });
        if (mlp_norm)
          for (long m = 0; m < M; m++)
            std::fill(&added[m * C] + columns.begin, &added[m * C] + columns.end, 0.0f);
#pragma omp barrier
        each_expert([&](const FeedForward& mlp, const Load& load, long start) {
          multiply(mlp.down, load.tokens.size(), &hidden[start], result.data());
          for (size_t i = 0; i < load.tokens.size(); i++)
            for (long c = columns.begin; c < columns.end; c++)
              to[load.tokens[i] * C + c] += load.weights[i] * result[i * C + c];
        });
      }
#pragma omp barrier
      if (mlp_norm) {
        add_normalised(layer.mlp_out_norm);
#pragma omp barrier
      }
    }
  }
}

}  // extern "C"
