// Decoding on a CPU: products of a few rows with a matrix that is read once, and whole GPT-2 blocks
// for a few tokens. gpt/kernels.py compiles this file and is its interface.
//
// Vectors of 16 are GCC's and Clang's, so that any processor runs this; `dot4` alone is written for
// AVX-512's VNNI, which multiplies 64 pairs of bytes at once. What is small is done by every thread
// for itself: that costs less than to wait for one that does it.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// A matrix [N, K] and what is added to a product with it. Formats: 0 float32, 1 bfloat16, 2 int8,
// 3 int4, the last two with rows padded to a multiple of 128; gpt/generation/inference.py has them.
struct Matrix {
  long format, N, K;
  const void *weights, *scales, *lows;
  const float* bias;
};

struct Norm {
  const float *weight, *bias;
  double epsilon;
};

struct Layer {
  Norm attn_norm, mlp_norm;
  Matrix qkv, out, up, down;
  double scale;  // of the attention scores
};

struct Shape {
  long n_layer, n_head, kv_heads, head_dim, activation;
};

// Keys and values [L, B, Hkv, S, D], float32 or bfloat16 (halves); strides are in numbers.
struct Cache {
  long halves;
  void *keys, *values;
  long layer_stride, row_stride, head_stride;
};

// Where in the cache a token stands.
struct Token {
  long row, place;
};

namespace {

constexpr long LANES = 16;  // numbers in a vector
constexpr long GROUP = 32;  // activations, and weights of int4, with one scale
constexpr long CHUNK = 128; // weights of int8 and int4 that are read together
constexpr long SMALL = 1 << 15;         // numbers of a matrix that one thread reads alone
constexpr long BLOCK = 64;              // rows of a matrix that meet all activations in turn
constexpr int AT_ONCE = 4;              // rows of activations that meet a row of the matrix at once

using Floats = float __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));
using Bytes = uint8_t __attribute__((vector_size(64)));
using Unsigned = uint8_t __attribute__((vector_size(16)));
using Pairs = uint16_t __attribute__((vector_size(64)));

template <class Vector>
inline Vector load(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline long padded(long n) { return (n + CHUNK - 1) / CHUNK * CHUNK; }

inline Floats floats(const float* from) { return load<Floats>(from); }

inline Floats floats(const uint16_t* from) {  // bfloat16 is the upper half of a float32
  return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

inline float number(float value) { return value; }

inline float number(uint16_t half) {
  uint32_t word = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline void put(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

inline void put(uint16_t* to, Floats v) {  // the nearest, and of two the even one
  Words word = (Words)v;
  Words nearest = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  Halves halves = __builtin_convertvector(v == v ? nearest : Words{} + 0x7fc0, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

template <class Number>
void put(Number* to, Floats v, long size) {  // the first `size` of v
  Number all[LANES];
  put(size < LANES ? all : to, v);
  if (size < LANES) std::copy_n(all, size, to);
}

// Bytes to whole numbers and back, in two steps: compilers make several of one of such a size.
inline Ints widened(const uint8_t* from) {
  return (Ints)__builtin_convertvector(__builtin_convertvector(load<Unsigned>(from), Halves), Words);
}

inline void put_bytes(int8_t* to, Ints v) {
  auto narrow = __builtin_convertvector(__builtin_convertvector((Words)v, Halves), Unsigned);
  std::memcpy(to, &narrow, sizeof narrow);
}

// The sum of each of up to four vectors, in an order that does not depend on their number.
template <int M>
inline void sums(const Floats (&v)[M], float* out) {
#if defined(__AVX512F__)
  auto get = [&](int i) { return i < M ? (__m512)v[i < M ? i : 0] : _mm512_setzero_ps(); };
  auto half = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  };
  __m512 ab = half(get(0), get(1)), cd = half(get(2), get(3));
  __m512 quarters = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  __m256 eighths = _mm256_add_ps(_mm512_castps512_ps256(quarters),
                                 (__m256)_mm512_extractf64x4_pd((__m512d)quarters, 1));
  __m128 all = _mm_add_ps(_mm256_castps256_ps128(eighths), _mm256_extractf128_ps(eighths, 1));
  std::memcpy(out, &all, M * sizeof(float));
#else
  for (int m = 0; m < M; m++) {
    out[m] = 0;
    for (int i = 0; i < LANES; i++) out[m] += v[m][i];
  }
#endif
}

inline float sum(Floats v) {
  float total;
  sums<1>({v}, &total);
  return total;
}

// To each sum, four products of an unsigned and a signed byte are added.
inline Ints dot4(Ints sums, Bytes u, const int8_t* s) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)u, load<__m512i>(s));
#else
  for (int i = 0; i < 64; i++) sums[i / 4] += int32_t(u[i]) * int32_t(s[i]);
  return sums;
#endif
}

// Four numbers of bfloat16, each four times.
inline Floats spread(const uint16_t* from) {
#if defined(__AVX512BW__)
  // the upper halves of float32s; the lower are 0
  const __m128i first = _mm_set_epi8(1, 0, -1, -1, 1, 0, -1, -1, 1, 0, -1, -1, 1, 0, -1, -1);
  const __m512i which = _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_set_m128i(
          _mm_add_epi8(first, _mm_set1_epi32(0x02020000)), first)),
      _mm256_set_m128i(_mm_add_epi8(first, _mm_set1_epi32(0x06060000)),
                       _mm_add_epi8(first, _mm_set1_epi32(0x04040000))),
      1);
  return (Floats)_mm512_shuffle_epi8(_mm512_set1_epi64(load<int64_t>(from)), which);
#else
  Floats all;
  for (int i = 0; i < LANES; i++) all[i] = number(from[i / 4]);
  return all;
#endif
}

// The part of 0 .. n - 1 that is this thread's.
struct Share {
  long begin, end;
  explicit Share(long n) {
    long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    begin = n * thread / threads, end = n * (thread + 1) / threads;
  }
};

// Rows of activations as a matrix wants them: as bfloat16; or as signed bytes, with a scale for each
// GROUP. Of CHUNK bytes, the first halves of the four groups come first, and then the second ones.
struct Activations {
  std::vector<uint16_t> halves;  // [M, n]

  long K = 0;                  // padded
  std::vector<int8_t> values;  // [M, K]
  std::vector<float> scales;   // [M, K / 8], each group's four times
  std::vector<float> sums;     // [M, K / GROUP], of the numbers that the values stand for
  std::vector<float> totals;   // [M], of the sums

  void round(const float* x, long n) {
    halves.resize(n);
    for (long i = 0; i < n; i += LANES) {
      Floats v = {};
      std::memcpy(&v, x + i, std::min(LANES, n - i) * sizeof(float));
      put(&halves[i], v, std::min(LANES, n - i));
    }
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
    Floats a = floats(from), b = floats(from + LANES);
    Floats absolute = a < 0 ? -a : a, other = b < 0 ? -b : b;
    Floats larger = absolute > other ? absolute : other;
    float largest = 0;
    for (int i = 0; i < LANES; i++) largest = larger[i] > largest ? larger[i] : largest;
    float inverse = largest > 0 ? 127 / largest : 0;
    // whole numbers are the last bits of what is this large
    Ints first = (Ints)(a * inverse + 0x1.8p23f) - 0x4b400000;
    Ints second = (Ints)(b * inverse + 0x1.8p23f) - 0x4b400000;
    put_bytes(values, first), put_bytes(values + CHUNK / 2, second);
    Ints numbers = (a == a) & (b == b);
    int32_t total = 0, all = -1;
    for (int i = 0; i < LANES; i++) total += first[i] + second[i], all &= numbers[i];
    float scale = all ? largest / 127 : NAN;  // what is not a number stays so
    for (int i = 0; i < GROUP / 8; i++) scales[i] = scale;
    return scale * float(total);
  }
};

// To each sum, the product of two floats, or those of two pairs of bfloat16, is added.
inline Floats dot(Floats sums, Floats a, Floats b) { return sums + a * b; }

inline Floats dot(Floats sums, Pairs a, Pairs b) {
#if defined(__AVX512BF16__)
  return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
  Words w = (Words)a, x = (Words)b;
  sums += (Floats)(w << 16) * (Floats)(x << 16);
  return sums + (Floats)(w & 0xffff0000) * (Floats)(x & 0xffff0000);
#endif
}

// M rows x [M, K] times R rows of the same kind: y [R, M]. A sum has one order whatever M is.
template <int R, int M, class Number>
inline void products(const Number* rows, const Number* x, long K, float* y) {
  constexpr long STEP = 64 / sizeof(Number);
  using Vector = std::conditional_t<sizeof(Number) == 2, Pairs, Floats>;
  Floats even[R][M] = {}, odd[R][M] = {};
  auto step = [=](long k, Floats (&sums)[R][M]) {
    Vector w[R];
    for (int r = 0; r < R; r++) w[r] = load<Vector>(rows + r * K + k);
    for (int m = 0; m < M; m++) {
      Vector v = load<Vector>(x + m * K + k);
      for (int r = 0; r < R; r++) sums[r][m] = dot(sums[r][m], w[r], v);
    }
  };
  long k = 0;
  for (; k + 2 * STEP <= K; k += 2 * STEP) step(k, even), step(k + STEP, odd);
  for (int r = 0; r < R; r++) {
    for (int m = 0; m < M; m++) even[r][m] += odd[r][m];
    sums<M>(even[r], y + r * M);
    for (int m = 0; m < M && k < K; m++) {
      float rest = 0;
      for (long i = k; i < K; i++)
        rest = std::fma(number(rows[r * K + i]), number(x[m * K + i]), rest);
      y[r * M + m] += rest;
    }
  }
}

// Bytes w stand for (w - 128) * scale.
template <int M>
inline void products8(const uint8_t* row, float scale, const Activations& x, long first, float* y) {
  Floats total[M] = {};
  for (long k = 0; k < x.K; k += CHUNK) {
    Bytes a = load<Bytes>(row + k), b = load<Bytes>(row + k + CHUNK / 2);
    for (int m = 0; m < M; m++) {
      long at = (first + m) * x.K + k;
      Ints sums = dot4(dot4(Ints{}, a, &x.values[at]), b, &x.values[at + CHUNK / 2]);
      total[m] += __builtin_convertvector(sums, Floats) * floats(&x.scales[at / 8]);
    }
  }
  sums<M>(total, y);
  for (int m = 0; m < M; m++) y[m] = scale * (y[m] - 128 * x.totals[first + m]);
}

// The 16 bytes of a group have its first 16 weights in their lower halves. A weight w stands for
// low + w * scale; scales and lows are bfloat16, one of each for every group.
template <int M>
inline void products4(const uint8_t* row, const uint16_t* scales, const uint16_t* lows,
                      const Activations& x, long first, float* y) {
  Floats total[M] = {};
  for (long k = 0; k < x.K; k += CHUNK) {
    Bytes both = load<Bytes>(row + k / 2), a = both & 15, b = both >> 4;
    Floats scale = spread(scales + k / GROUP);
    for (int m = 0; m < M; m++) {
      long at = (first + m) * x.K + k;
      Ints sums = dot4(dot4(Ints{}, a, &x.values[at]), b, &x.values[at + CHUNK / 2]);
      total[m] += __builtin_convertvector(sums, Floats) * (scale * floats(&x.scales[at / 8]));
    }
  }
  long G = x.K / GROUP, whole = G / LANES * LANES;
  for (int m = 0; m < M; m++)
    for (long g = 0; g < whole; g += LANES)
      total[m] += floats(lows + g) * floats(&x.sums[(first + m) * G + g]);
  sums<M>(total, y);
  for (int m = 0; m < M; m++) {
    const float* rest = &x.sums[(first + m) * G];
    for (long g = whole; g < G; g += 4)  // a chunk has four
      y[m] += (number(lows[g]) * rest[g] + number(lows[g + 1]) * rest[g + 1]) +
              (number(lows[g + 2]) * rest[g + 2] + number(lows[g + 3]) * rest[g + 3]);
  }
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
        float& place = y[(first + m) * matrix.N + n + r];
        place = (add ? place : 0) + out[r * M + m] + (matrix.bias ? matrix.bias[n + r] : 0);
      }
  }
};

// Rows of floating point: R of them meet the same activations while these are in registers.
template <int M, class Number>
void sweep_floats(const Product& product, const Number* weights, long begin, long end, long first,
                  const Number* x) {
  constexpr int R = M == 1 ? 1 : 3;  // one token waits for the memory, in its order
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

template <int M>
void sweep(const Product& product, long begin, long end, long first, const float* x,
           const Activations& q) {
  const Matrix& matrix = product.matrix;
  auto bytes = static_cast<const uint8_t*>(matrix.weights);
  auto halves = static_cast<const uint16_t*>(matrix.weights);
  if (matrix.format == 0) {
    sweep_floats<M>(product, static_cast<const float*>(matrix.weights), begin, end, first, x);
  } else if (matrix.format == 1) {
    sweep_floats<M>(product, halves, begin, end, first, q.halves.data());
  } else if (matrix.format == 2) {
    auto scales = static_cast<const float*>(matrix.scales);
    for (long n = begin; n < end; n++)
      product.put<1, M>(n, first, [=, &q](long n, float* out) {
        products8<M>(bytes + n * q.K, scales[n], q, first, out);
      });
  } else {
    auto scales = static_cast<const uint16_t*>(matrix.scales);
    auto lows = static_cast<const uint16_t*>(matrix.lows);
    for (long n = begin; n < end; n++)
      product.put<1, M>(n, first, [=, &q](long n, float* out) {
        long g = n * q.K / GROUP;
        products4<M>(bytes + n * q.K / 2, scales + g, lows + g, q, first, out);
      });
  }
}

using Sweep = void (*)(const Product&, long, long, long, const float*, const Activations&);
constexpr Sweep SWEEPS[] = {nullptr, sweep<1>, sweep<2>, sweep<3>, sweep<4>};

// This thread's part of y [M, N] = x [M, K] times the matrix, plus its bias; or added to y.
void multiply(const Matrix& matrix, long M, const float* x, float* y, bool add = false) {
  static thread_local Activations q;
  if (matrix.format == 1) q.round(x, M * matrix.K);
  if (matrix.format >= 2) q.quantise(x, M, matrix.K);
  Share own(matrix.N);
  for (long n = own.begin; n < own.end; n += BLOCK)  // it stays in the processor's cache
    for (long first = 0; first < M; first += AT_ONCE)
      SWEEPS[std::min<long>(AT_ONCE, M - first)]({matrix, y, add}, n, std::min(n + BLOCK, own.end),
                                                 first, x, q);
}

// A row of K numbers as they are multiplied with.
template <class Number>
void dense8(const uint8_t* row, float scale, long K, Number* out) {
  for (long k = 0; k < K; k += LANES) {
    long g = k % CHUNK / GROUP, second = k % GROUP / LANES;
    Ints w = widened(row + k - k % CHUNK + second * CHUNK / 2 + g * LANES) - 128;
    put(out + k, __builtin_convertvector(w, Floats) * scale, std::min(LANES, K - k));
  }
}

template <class Number>
void dense4(const uint8_t* row, const uint16_t* scales, const uint16_t* lows, long K, Number* out) {
  for (long k = 0; k < K; k += LANES) {
    long g = k / GROUP;
    Ints w = widened(row + g * LANES);
    w = (k % GROUP ? w >> 4 : w) & 15;
    put(out + k, number(lows[g]) + __builtin_convertvector(w, Floats) * number(scales[g]),
        std::min(LANES, K - k));
  }
}

template <class Number>
void dense(const Matrix& matrix, Number* out) {
  long N = matrix.N, K = matrix.K, P = padded(K);
  auto bytes = static_cast<const uint8_t*>(matrix.weights);
#pragma omp parallel for schedule(static) if (N * K > SMALL)
  for (long n = 0; n < N; n++) {
    if (matrix.format == 2) {
      dense8(bytes + n * P, static_cast<const float*>(matrix.scales)[n], K, out + n * K);
    } else {
      long g = n * P / GROUP;
      dense4(bytes + n * P / 2, static_cast<const uint16_t*>(matrix.scales) + g,
             static_cast<const uint16_t*>(matrix.lows) + g, K, out + n * K);
    }
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

// Each row of x [M, C], made to have the mean 0 and the variance 1 (LayerNorm).
void normalise(const Norm& norm, const float* __restrict x, long M, long C, float* __restrict out) {
  for (long m = 0; m < M; m++, x += C, out += C) {
    float mean = add_up(x, C, [](auto v) { return v; }) / float(C);
    float variance = add_up(x, C, [=](auto v) { return (v - mean) * (v - mean); }) / float(C);
    float scale = 1 / std::sqrt(variance + float(norm.epsilon));
    for (long c = 0; c < C; c++) out[c] = (x[c] - mean) * scale * norm.weight[c];
    if (norm.bias)
      for (long c = 0; c < C; c++) out[c] += norm.bias[c];
  }
}

inline Floats exponential(Floats x) {  // to 2e-7 of itself; below -87 as there
  x = x < -87 ? Floats{} - 87 : x;
  x = x > 88 ? Floats{} + 88 : x;
  Ints power = (Ints)(x * 1.44269504f + 0x1.8p23f) - 0x4b400000;  // rounded, as in quantise
  Floats r = x - __builtin_convertvector(power, Floats) * 0.693147181f;
  Floats series = 1 + r / 5 * (1 + r / 6);
  series = 1 + r * (1 + r / 2 * (1 + r / 3 * (1 + r / 4 * series)));
  return series * (Floats)((power + 127) << 23);
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
  else  // tanh
    for (long i = 0; i < n; i++) x[i] = tanhf(x[i]);
}

// One query's attention over S keys [S, D] and values.
template <class Number>
void attend(const float* q, const Number* keys, const Number* values, long S, long D, float scale,
            float* out) {
  static thread_local std::vector<float> scores;
  scores.resize(S);
  float largest = -INFINITY;
  for (long s = 0; s < S; s++) {
    Floats products = {};
    for (long d = 0; d < D; d += LANES) products += floats(q + d) * floats(keys + s * D + d);
    scores[s] = scale * sum(products);
    largest = scores[s] > largest ? scores[s] : largest;
  }
  each(scores.data(), S, [=](Floats v) { return exponential(v - largest); });
  float total = add_up(scores.data(), S, [](auto v) { return v; });
  for (long d = 0; d < D; d += LANES) {
    Floats sums = {};
    for (long s = 0; s < S; s++) sums += scores[s] * floats(values + s * D + d);
    put(out + d, sums / total);
  }
}

// This thread's part of the attention of M new tokens, qkv [M, H + 2 Hkv, D], to out [M, H, D].
// Each token's keys and values are put at its place in its row of the cache, and it sees those up to
// there.
template <class Number>
void attention(const Shape& shape, double scale, Number* keys, Number* values, const Cache& cache,
               const Token* tokens, long M, const float* qkv, float* out) {
  long H = shape.n_head, G = shape.kv_heads, D = shape.head_dim;
  Share appending(M * G), own(M * H);
  for (long i = appending.begin; i < appending.end; i++) {
    long m = i / G, g = i % G;
    long at = tokens[m].row * cache.row_stride + g * cache.head_stride + tokens[m].place * D;
    const float *k = qkv + (m * (H + 2 * G) + H + g) * D, *v = k + G * D;
    for (long d = 0; d < D; d += LANES) {
      put(keys + at + d, floats(k + d));
      put(values + at + d, floats(v + d));
    }
  }
#pragma omp barrier
  for (long i = own.begin; i < own.end; i++) {
    long m = i / H, h = i % H;
    long at = tokens[m].row * cache.row_stride + h / (H / G) * cache.head_stride;
    const float* q = qkv + (m * (H + 2 * G) + h) * D;
    attend(q, keys + at, values + at, tokens[m].place + 1, D, float(scale), out + i * D);
  }
}

}  // namespace

extern "C" {

// y [M, N] = x [M, K] times the matrix, plus its bias.
void gpt_linear(const Matrix* matrix, long M, const float* x, float* y) {
#pragma omp parallel if (matrix->N * matrix->K > SMALL)
  multiply(*matrix, M, x, y);
}

// out [N, K] of float32 or bfloat16 (halves), from a matrix of int8 or int4.
void gpt_dense(const Matrix* matrix, long halves, void* out) {
  if (halves) dense(*matrix, static_cast<uint16_t*>(out));
  else dense(*matrix, static_cast<float*>(out));
}

// GPT-2's blocks (pre-norm, as gpt/model/block.py has them) for M new tokens, each of some row of the
// cache, which takes them: x [M, C] becomes what comes out.
void gpt_blocks(const Layer* layers, const Shape* shape, const Cache* cache, const Token* tokens,
                long M, float* x) {
  long C = layers->out.N, inner = layers->up.N;
  std::vector<float> qkv(M * layers->qkv.N), heads(M * C), hidden(M * inner);
#pragma omp parallel if (C * C > SMALL)
  {
    std::vector<float> normal(M * C);
    for (long l = 0; l < shape->n_layer; l++) {
      const Layer& layer = layers[l];
      normalise(layer.attn_norm, x, M, C, normal.data());
      multiply(layer.qkv, M, normal.data(), qkv.data());
#pragma omp barrier
      auto attended = [&](auto* keys, auto* values) {
        attention(*shape, layer.scale, keys + l * cache->layer_stride,
                  values + l * cache->layer_stride, *cache, tokens, M, qkv.data(), heads.data());
      };
      if (cache->halves)
        attended(static_cast<uint16_t*>(cache->keys), static_cast<uint16_t*>(cache->values));
      else
        attended(static_cast<float*>(cache->keys), static_cast<float*>(cache->values));
#pragma omp barrier
      multiply(layer.out, M, heads.data(), x, true);
#pragma omp barrier
      normalise(layer.mlp_norm, x, M, C, normal.data());
      multiply(layer.up, M, normal.data(), hidden.data());
      Share own(inner);
      for (long m = 0; m < M; m++)
        activate(shape->activation, &hidden[m * inner + own.begin], own.end - own.begin);
#pragma omp barrier
      multiply(layer.down, M, hidden.data(), x, true);
#pragma omp barrier
    }
  }
}

}  // extern "C"
