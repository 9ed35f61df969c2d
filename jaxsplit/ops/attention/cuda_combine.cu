// Combines what attention to SPLITS of the keys has found, for each of ROWS queries and each of its
// HEADS. A thread has four neighbors of a head of VALUE_DIM.

struct Splits {
  const float *sums;          // [SPLITS, ROWS, HEADS, VALUE_DIM]
  const float *most, *total;  // [SPLITS, ROWS, HEADS], to the base 2
};

// Rows as an array.
struct Plain {
  X* values;  // [rows, columns]

  __device__ void store_quad(const float* x, int row, int column, int rows, int columns,
                             bool exists) const {
    if (!exists) return;
    X* to = values + (long)row * columns + column;
    for (int i = 0; i < 4; i += 2) *(u32*)(to + i) = pack<X>(x[i], x[i + 1]);
  }
};

template <class Out>
__device__ void combine(const Splits& splits, const float* sinks, const Out& out) {
  constexpr long ALL = (long)ROWS * HEADS;
  constexpr int QUADS = VALUE_DIM / 4;
  long quad = (long)blockIdx.x * THREADS + threadIdx.x, head = quad / QUADS;
  bool exists = head < ALL;
  head = exists ? head : ALL - 1;
  int column = quad % QUADS * 4;
  float most[SPLITS], y[4] = {};
  float sink = SINKS ? sinks[head % HEADS] * LOG2_E : MASKED, largest = sink;
#pragma unroll
  for (int i = 0; i < SPLITS; i++) {
    most[i] = splits.most[head + i * ALL];
    largest = fmaxf(most[i], largest);
  }
  float total = SINKS ? power_of_two(sink - largest) : 0;
#pragma unroll
  for (int i = 0; i < SPLITS; i++) {
    long at = head + i * ALL;
    Words sums = load_words(splits.sums + at * VALUE_DIM + column);
    float weight = power_of_two(most[i] - largest);
    total += weight * splits.total[at];
    // A split that saw no key has not stored any sums.
    for (int j = 0; j < 4; j++) y[j] += most[i] > MASKED ? weight * bits_float(sums.at[j]) : 0;
  }
  float inverse = 1 / fmaxf(total, 1e-30f);
  for (int j = 0; j < 4; j++) y[j] *= inverse;
  int row = head / HEADS, first = head % HEADS * VALUE_DIM;
  out.store_quad(y, row, first + column, ROWS, HEADS * VALUE_DIM, exists);
}
