// Training on a CPU: what lies between a block's matrix products, each in one pass over its memory, forward
// and backward. gpt/training_kernels.py compiles this file and is its interface.
//
// Numbers in memory are float32 or bfloat16, and all arithmetic is float32.

#include "vectors.h"

#include <vector>

// Which elements are dropped is a function of the seed and the element's place alone, so that the backward
// pass computes the same ones again, with any number of threads. Nothing is dropped where scale is 0.
struct Dropout {
  uint32_t seed, key, dropped;  // an element is kept if its random word is at least `dropped`
  float scale;                  // of what is kept
};

// The heads of B x T tokens. cos and sin are [rows, pairs]: a row for each of T positions, or for each token.
struct Heads {
  long B, T, n_head, kv_heads, D, pairs, rows;
  const float *cos, *sin;
  double epsilon;  // of the norm of each query and key; negative without a norm
};

namespace {

template <class Number>
inline Floats part(const Number* from, long size) {  // the first `size` numbers, and zeros
  if (size >= LANES) return floats(from);
  Number all[LANES] = {};
  std::copy_n(from, size, all);
  return floats(all);
}

// `function(i, size)` for each vector of n numbers.
template <class Function>
inline void steps(long n, Function function) {
  for (long i = 0; i < n; i += LANES) function(i, std::min(LANES, n - i));
}

inline Words counting() {
  Words lanes;
  for (long i = 0; i < LANES; i++) lanes[i] = i;
  return lanes;
}

// What the elements from `place` on are multiplied by. The mixing is that of the hash "lowbias32" (Chris
// Wellons, hash-prospector), with a key between its rounds.
inline Floats factors(const Dropout& dropout, long place) {
  Words x = counting() + (uint32_t(place) + dropout.seed);
  x ^= x >> 16;
  x *= 0x21f0aaad;
  x += dropout.key ^ (uint32_t(place >> 32) * 0x85ebca6b);
  x ^= x >> 15;
  x *= 0xd35a2d97;
  x ^= x >> 15;
  return x >= dropout.dropped ? Floats{} + dropout.scale : Floats{};
}

template <class Function>
void shared(long n, Function function) {  // each thread takes a part of 0 .. n - 1
#pragma omp parallel
  {
    Share mine(n);
    function(mine.begin, mine.end);
  }
}

template <class In, class Out>
void rms_norm(const In* x, const float* weight, Out* y, float* inverse, long rows, long C, double epsilon) {
  shared(rows, [=](long begin, long end) {
    for (long r = begin; r < end; r++) {
      const In* from = x + r * C;
      Floats squares = {};
      steps(C, [&](long i, long size) {
        Floats v = part(from + i, size);
        squares += v * v;
      });
      float scale = inverse[r] = 1 / std::sqrt(sum(squares) / C + float(epsilon));
      steps(C, [&](long i, long size) {
        Floats v = part(from + i, size) * scale;
        put(y + r * C + i, weight ? v * part(weight + i, size) : v, size);
      });
    }
  });
}

// weight_slopes: [threads, C], zeros before, which the caller adds up; or null.
template <class In, class Out>
void rms_norm_back(const Out* slope, const In* x, const float* weight, const float* inverse, In* out,
                   float* weight_slopes, long rows, long C) {
#pragma omp parallel
  {
    Share mine(rows);
    float* own = weight_slopes ? weight_slopes + omp_get_thread_num() * C : nullptr;
    for (long r = mine.begin; r < mine.end; r++) {
      const In* from = x + r * C;
      const Out* g = slope + r * C;
      float scale = inverse[r];
      Floats dots = {};
      steps(C, [&](long i, long size) {
        Floats product = part(g + i, size) * part(from + i, size);
        if (own) put(own + i, part(own + i, size) + product * scale, size);
        dots += weight ? product * part(weight + i, size) : product;
      });
      float mean = sum(dots) / C * scale * scale;
      steps(C, [&](long i, long size) {
        Floats v = part(g + i, size);
        if (weight) v *= part(weight + i, size);
        put(out + r * C + i, (v - part(from + i, size) * mean) * scale, size);
      });
    }
  }
}

template <class X, class Y>
void add_dropped(const X* x, const Y* y, X* out, long n, Dropout dropout) {
  shared((n + LANES - 1) / LANES, [=](long begin, long end) {
    for (long i = begin * LANES; i < std::min(n, end * LANES); i += LANES) {
      long size = std::min(LANES, n - i);
      put(out + i, part(x + i, size) + part(y + i, size) * factors(dropout, i), size);
    }
  });
}

template <class X, class Y>
void dropped(const X* x, Y* out, long n, Dropout dropout) {
  shared((n + LANES - 1) / LANES, [=](long begin, long end) {
    for (long i = begin * LANES; i < std::min(n, end * LANES); i += LANES) {
      long size = std::min(LANES, n - i);
      put(out + i, part(x + i, size) * factors(dropout, i), size);
    }
  });
}

template <class Number>
void relu_squared(const Number* x, const Number* slope, Number* out, long n) {
  shared((n + LANES - 1) / LANES, [=](long begin, long end) {
    for (long i = begin * LANES; i < std::min(n, end * LANES); i += LANES) {
      long size = std::min(LANES, n - i);
      Floats v = part(x + i, size);
      v = v < 0 ? Floats{} : v;
      put(out + i, slope ? 2 * v * part(slope + i, size) : v * v, size);
    }
  });
}

// The pairs of a head, rotated by an angle, or back by it with a negative `direction`.
inline void rotate(float* head, const Heads& heads, long token, float direction) {
  long n = heads.pairs, row = heads.rows == heads.T ? token % heads.T : token;
  const float *cos = heads.cos + row * n, *sin = heads.sin + row * n;
  steps(n, [&](long i, long size) {
    Floats a = part(head + i, size), b = part(head + n + i, size);
    Floats c = part(cos + i, size), s = part(sin + i, size) * direction;
    put(head + i, a * c - b * s, size);
    put(head + n + i, b * c + a * s, size);
  });
}

inline float inverse_of(const float* head, long D, double epsilon) {
  Floats squares = {};
  steps(D, [&](long i, long size) {
    Floats v = part(head + i, size);
    squares += v * v;
  });
  return 1 / std::sqrt(sum(squares) / D + float(epsilon));
}

// qkv [B, T, H + 2 Hkv, D] to queries, keys and values [B, heads, T, D].
template <class Number>
void split_heads(const Heads& heads, const Number* qkv, Number* const out[3]) {
  const long H = heads.n_head, kv = heads.kv_heads, D = heads.D, all = H + 2 * kv;
  shared(heads.B * heads.T, [&](long begin, long end) {
    std::vector<float> head(D + LANES);
    for (long token = begin; token < end; token++)
      for (long h = 0; h < all; h++) {
        const Number* from = qkv + (token * all + h) * D;
        long which = h < H ? 0 : h < H + kv ? 1 : 2, of = which ? kv : H;
        long number = h - (which == 0 ? 0 : which == 1 ? H : H + kv);
        Number* to = out[which] + ((token / heads.T * of + number) * heads.T + token % heads.T) * D;
        if (which == 2) {
          std::copy_n(from, D, to);
          continue;
        }
        steps(D, [&](long i, long size) { put(&head[i], part(from + i, size), size); });
        if (heads.epsilon >= 0) {
          float scale = inverse_of(head.data(), D, heads.epsilon);
          steps(D, [&](long i, long size) { put(&head[i], part(&head[i], size) * scale, size); });
        }
        if (heads.pairs) rotate(head.data(), heads, token, 1);
        steps(D, [&](long i, long size) { put(to + i, part(&head[i], size), size); });
      }
  });
}

template <class Number>
void split_heads_back(const Heads& heads, const Number* qkv, const Number* const slopes[3], Number* out) {
  const long H = heads.n_head, kv = heads.kv_heads, D = heads.D, all = H + 2 * kv;
  shared(heads.B * heads.T, [&](long begin, long end) {
    std::vector<float> slope(D + LANES), head(D + LANES);
    for (long token = begin; token < end; token++)
      for (long h = 0; h < all; h++) {
        long which = h < H ? 0 : h < H + kv ? 1 : 2, of = which ? kv : H;
        long number = h - (which == 0 ? 0 : which == 1 ? H : H + kv);
        const Number* from = slopes[which] + ((token / heads.T * of + number) * heads.T + token % heads.T) * D;
        Number* to = out + (token * all + h) * D;
        if (which == 2) {
          std::copy_n(from, D, to);
          continue;
        }
        steps(D, [&](long i, long size) { put(&slope[i], part(from + i, size), size); });
        if (heads.pairs) rotate(slope.data(), heads, token, -1);
        if (heads.epsilon >= 0) {
          const Number* x = qkv + (token * all + h) * D;
          Floats dots = {};
          steps(D, [&](long i, long size) {
            Floats v = part(x + i, size);
            put(&head[i], v, size);
            dots += v * part(&slope[i], size);
          });
          float scale = inverse_of(head.data(), D, heads.epsilon);
          float mean = sum(dots) / D * scale * scale;
          steps(D, [&](long i, long size) {
            put(&slope[i], (part(&slope[i], size) - part(&head[i], size) * mean) * scale, size);
          });
        }
        steps(D, [&](long i, long size) { put(to + i, part(&slope[i], size), size); });
      }
  });
}

// Which places of a vector are below n.
inline Ints below(long n) { return (Ints)counting() < (int32_t)std::min(n, LANES); }

// A block of scores [M, queries, keys]: M heads, and the queries that end at position `keys`.
struct Causal {
  long M, queries, keys, length;  // length: of the whole sequence, which numbers the weights for dropout
  double scale;
};

// Calls `function` for each row of a block of scores. It gets the row, how many keys the row sees, this number rounded
// up to whole vectors, the number of the row's first weight, and room for a row.
template <class Function>
void causal_rows(Causal c, Function function) {
  shared(c.M * c.queries, [=](long begin, long end) {
    std::vector<float> row(c.keys + LANES);
    for (long r = begin; r < end; r++) {
      long t = c.keys - c.queries + r % c.queries, n = t + 1;
      long used = std::min(c.keys, (n + LANES - 1) / LANES * LANES);
      function(r, n, used, (r / c.queries * c.length + t) * c.length, row.data());
    }
  });
}

// In place: causal scores, times `scale`, to their softmax. `left` gets what dropout leaves of it.
template <class Number>
void causal_softmax(Number* scores, Number* left, Causal c, Dropout dropout) {
  causal_rows(c, [=, T = c.keys](long r, long n, long used, long number, float* row) {
    Number *own = scores + r * T, *rest = left + r * T;
    Floats most = Floats{} - INFINITY;
    for (long i = 0; i < n; i += LANES) {
      Floats v = part(own + i, T - i) * float(c.scale);
      v = below(n - i) ? v : Floats{} - INFINITY;
      std::memcpy(&row[i], &v, sizeof v);
      most = v > most ? v : most;
    }
    float largest = -INFINITY;
    for (long j = 0; j < LANES; j++) largest = std::max(largest, most[j]);
    Floats total = {};
    for (long i = 0; i < n; i += LANES) {
      Floats v = exponential(floats(&row[i]) - largest);
      v = below(n - i) ? v : Floats{};
      std::memcpy(&row[i], &v, sizeof v);
      total += v;
    }
    float inverse = 1 / sum(total);
    for (long i = 0; i < n; i += LANES) {
      Floats v = floats(&row[i]) * inverse;
      put(own + i, v, T - i);
      if (left) put(rest + i, v * factors(dropout, number + i), T - i);
    }
    std::fill_n(own + used, T - used, Number{});
    if (left) std::fill_n(rest + used, T - used, Number{});
  });
}

// In place: the gradient of the weights after dropout, to that of the scores. `left` gets the weights after dropout.
// Weights that the causal mask hides are 0.
template <class Number>
void causal_softmax_back(const Number* weights, Number* slopes, Number* left, Causal c, Dropout dropout) {
  causal_rows(c, [=, T = c.keys](long r, long n, long used, long number, float* row) {
    const Number* own = weights + r * T;
    Number *slope = slopes + r * T, *rest = left + r * T;
    Floats dots = {};
    for (long i = 0; i < n; i += LANES) {
      Floats v = part(slope + i, T - i), w = part(own + i, T - i);
      v = below(n - i) ? v : Floats{};  // what is hidden may be infinite
      if (left) {
        Floats kept = factors(dropout, number + i);
        put(rest + i, w * kept, T - i);
        v *= kept;
      }
      std::memcpy(&row[i], &v, sizeof v);
      dots += v * w;
    }
    float mean = sum(dots);
    for (long i = 0; i < n; i += LANES)
      put(slope + i, part(own + i, T - i) * (floats(&row[i]) - mean) * float(c.scale), T - i);
    std::fill_n(slope + used, T - used, Number{});
    if (left) std::fill_n(rest + used, T - used, Number{});
  });
}

// `function` with a null pointer of the numbers' type: 0 float32, 1 bfloat16.
template <class Function>
void typed(long type, Function function) {
  if (type)
    function((uint16_t*)nullptr);
  else
    function((float*)nullptr);
}

}  // namespace

extern "C" {

long gpt_threads() { return omp_get_max_threads(); }

void gpt_rms_norm(long in, long out, const void* x, const float* weight, void* y, float* inverse, long rows,
                  long C, double epsilon) {
  typed(in, [&](auto* of_x) {
    typed(out, [&](auto* of_y) {
      rms_norm((decltype(of_x))x, weight, (decltype(of_y))y, inverse, rows, C, epsilon);
    });
  });
}

void gpt_rms_norm_back(long in, long out, const void* slope, const void* x, const float* weight,
                       const float* inverse, void* x_slope, float* weight_slopes, long rows, long C) {
  typed(in, [&](auto* of_x) {
    typed(out, [&](auto* of_y) {
      rms_norm_back((decltype(of_y))slope, (decltype(of_x))x, weight, inverse, (decltype(of_x))x_slope,
                    weight_slopes, rows, C);
    });
  });
}

void gpt_add_dropped(long in, long branch, const void* x, const void* y, void* out, long n, Dropout dropout) {
  typed(in, [&](auto* of_x) {
    typed(branch, [&](auto* of_y) {
      add_dropped((decltype(of_x))x, (decltype(of_y))y, (decltype(of_x))out, n, dropout);
    });
  });
}

void gpt_dropped(long in, long out, const void* x, void* y, long n, Dropout dropout) {
  typed(in, [&](auto* of_x) {
    typed(out, [&](auto* of_y) { dropped((decltype(of_x))x, (decltype(of_y))y, n, dropout); });
  });
}

void gpt_relu_squared(long type, const void* x, const void* slope, void* out, long n) {
  typed(type, [&](auto* of) {
    using Number = decltype(of);
    relu_squared((Number)x, (Number)slope, (Number)out, n);
  });
}

void gpt_split_heads(long type, const Heads* heads, const void* qkv, void* q, void* k, void* v) {
  typed(type, [&](auto* of) {
    using Number = decltype(of);
    const Number out[3] = {(Number)q, (Number)k, (Number)v};
    split_heads(*heads, (Number)qkv, out);
  });
}

void gpt_split_heads_back(long type, const Heads* heads, const void* qkv, const void* q, const void* k,
                          const void* v, void* out) {
  typed(type, [&](auto* of) {
    using Number = std::remove_pointer_t<decltype(of)>;
    const Number* const slopes[3] = {(const Number*)q, (const Number*)k, (const Number*)v};
    split_heads_back(*heads, (const Number*)qkv, slopes, (Number*)out);
  });
}

void gpt_causal_softmax(long type, void* scores, void* left, Causal causal, Dropout dropout) {
  typed(type, [&](auto* of) {
    using Number = decltype(of);
    causal_softmax((Number)scores, (Number)left, causal, dropout);
  });
}

void gpt_causal_softmax_back(long type, const void* weights, void* slopes, void* left, Causal causal,
                             Dropout dropout) {
  typed(type, [&](auto* of) {
    using Number = decltype(of);
    causal_softmax_back((Number)weights, (Number)slopes, (Number)left, causal, dropout);
  });
}
}
