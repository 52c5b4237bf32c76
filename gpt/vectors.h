// Vectors of floats, as wide as the processor's registers, for kernels.cpp and training_kernels.cpp.
//
// Vectors are those of GCC and Clang, so every processor runs them. Some functions have a version for
// an instruction set, between #if and #endif.

#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// The instruction set whose versions are compiled.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define GPT_AVX512  // AVX-512 without VNNI uses the AVX2 versions (not measured)
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__)
#define GPT_AVX2
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#define GPT_NEON
#include <arm_neon.h>
#endif

namespace {

// Bytes of a vector register, and how many registers there are.
#if defined(GPT_AVX512)
constexpr long WIDTH = 64, REGISTERS = 32;
#elif defined(GPT_AVX2)
constexpr long WIDTH = 32, REGISTERS = 16;
#elif defined(GPT_NEON)
constexpr long WIDTH = 16, REGISTERS = 32;
#else
constexpr long WIDTH = 16, REGISTERS = 16;
#endif
constexpr long LANES = WIDTH / 4;  // numbers in a vector

using Floats = float __attribute__((vector_size(WIDTH)));
using Ints = int32_t __attribute__((vector_size(WIDTH)));
using Words = uint32_t __attribute__((vector_size(WIDTH)));
using Pairs = uint16_t __attribute__((vector_size(WIDTH)));
using Bytes = uint8_t __attribute__((vector_size(WIDTH)));
using Halves = uint16_t __attribute__((vector_size(WIDTH / 2)));
using Quarters = uint8_t __attribute__((vector_size(WIDTH / 4)));

template <class Vector>
inline Vector load(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline Floats floats(const float* from) { return load<Floats>(from); }

inline Floats floats(const uint16_t* from) {  // bfloat16 is the upper half of a float32
#if defined(GPT_AVX512)  // GCC splits this conversion
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16);
#elif defined(GPT_AVX2)
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from)), 16);
#else
  return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
#endif
}

inline float number(float value) { return value; }

inline float number(uint16_t half) {
  uint32_t word = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline void put(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

inline void put(uint16_t* to, Floats v) {  // rounded to the nearest, ties to even
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

// The sum of each of up to four vectors, in an order that does not depend on their number.
template <int M>
inline void sums(const Floats (&v)[M], float* out) {
#if defined(GPT_AVX512) || defined(GPT_AVX2)
  __m256 half[4] = {};
  for (int m = 0; m < M; m++) {
#if defined(GPT_AVX512)
    half[m] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[m]),
                            (__m256)_mm512_extractf64x4_pd((__m512d)v[m], 1));
#else
    half[m] = (__m256)v[m];
#endif
  }
  __m256 fours = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  __m128 all = _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1));
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

// The part of 0 .. n - 1 that is this thread's.
struct Share {
  long begin, end;
  explicit Share(long n) {
    long thread = omp_get_thread_num(), threads = omp_get_num_threads();
    begin = n * thread / threads, end = n * (thread + 1) / threads;
  }
};

inline Floats exponential(Floats x) {  // to 5e-7 of itself, or 5e-6 without FMA; below -87 as there
  x = x < -87 ? Floats{} - 87 : x;
  x = x > 88 ? Floats{} + 88 : x;
  Ints power = (Ints)(x * 1.44269504f + 0x1.8p23f) - 0x4b400000;  // rounded, as in quantise
  Floats r = x - __builtin_convertvector(power, Floats) * 0.693147181f;
  Floats series = 1.f / 120 + r * (1.f / 720);  // multiplied: a division takes ten times as long
  series = 1 + r * (1 + r * (1.f / 2 + r * (1.f / 6 + r * (1.f / 24 + r * series))));
  return series * (Floats)((power + 127) << 23);
}

}  // namespace
