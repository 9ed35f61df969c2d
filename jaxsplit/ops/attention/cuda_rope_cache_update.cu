// What is between projections and attention: heads are normalized and rotated, and new keys and
// values go to the cache. A warp has a head of a token.
//
// HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM, ROPE_DIM, INTERLEAVED, NORMS (1: of queries, 2: of keys) and
// EPSILONS describe the layer; PAGE (positions of a page), PAGES (of a sequence), RING (positions wrap
// around) and TIME the cache and the batch. `X` and `Stored` are the types of projections and of the
// cache.

struct Projections {
  const X *query, *key, *value;            // [tokens, heads, width]
  const float *cos, *sin;                  // [tokens, ROPE_DIM / 2]
  const float *query_scale, *key_scale;    // [HEAD_DIM], or null
};

// The columns of a head that a thread has: every 32nd.
template <int WIDTH>
struct Columns {
  static constexpr int COUNT = (WIDTH + 31) / 32;
  float at[COUNT] = {};

  template <class Function>
  __device__ void for_each(Function function) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      int column = threadIdx.x % 32 + 32 * i;
      if (WIDTH % 32 == 0 || column < WIDTH) function(at[i], column);
    }
  }

  __device__ void store_in(Stored* to, float* scale_at) {
    u32 most = 0;
    if (CODES) {
      for_each([&](float x, int) { most = max(most, magnitude(x)); });
      for (int d = 16; d; d /= 2) most = max(most, exchange(most, d));
    }
    float scale = scale_of(most);
    for_each([&](float x, int column) { store_scaled(to + column, x, scale); });
    if (CODES && threadIdx.x % 32 == 0) *scale_at = scale;
  }
};

__device__ inline Columns<HEAD_DIM> rotated(const X* head, const float* cos, const float* sin,
                                            const float* scale, bool normed, float epsilon) {
  Columns<HEAD_DIM> y;
  float factor = 1;
  if (normed) {
    float squares = 0;
    y.for_each([&](float, int column) { squares += load(head + column) * load(head + column); });
    for (int d = 16; d; d /= 2) squares += exchange(squares, d);
    factor = inverse_root(squares / HEAD_DIM + epsilon);
  }
  auto value = [&](int column) {
    float x = load(head + column) * factor;
    return normed && scale ? x * scale[column] : x;
  };
  y.for_each([&](float& x, int column) {
    x = value(column);
    if (column >= ROPE_DIM) return;
    int other = partner(column), pair = INTERLEAVED ? column / 2 : min(column, other);
    x = x * cos[pair] + value(other) * (column < other ? -sin[pair] : sin[pair]);
  });
  return y;
}

__device__ inline void update(const Projections& x, const int* positions, const int* pages,
                              const Cache& cache, X* queries) {
  long token = blockIdx.x;
  int unit = blockIdx.y * WARPS + warp_index();
  if (unit >= HEADS + 2 * KV_HEADS) return;
  const float *cos = x.cos + token * (ROPE_DIM / 2), *sin = x.sin + token * (ROPE_DIM / 2);
  if (unit < HEADS) {
    long head = token * HEADS + unit;
    auto y = rotated(x.query + head * HEAD_DIM, cos, sin, x.query_scale, NORMS & 1, QUERY_EPSILON);
    y.for_each([&](float x, int column) { store(queries + head * HEAD_DIM + column, x); });
    return;
  }
  int position = positions[token], head = (unit - HEADS) % KV_HEADS;
  if (position < 0 || (!RING && position >= LENGTH)) return;
  int sequence = token / TIME, place = position % LENGTH;
  long page = pages ? pages[sequence * PAGES + place / PAGE] : sequence;
  long row = (page * KV_HEADS + head) * PAGE + place % PAGE;
  if (unit < HEADS + KV_HEADS) {
    const X* key = x.key + (token * KV_HEADS + head) * HEAD_DIM;
    auto y = rotated(key, cos, sin, x.key_scale, NORMS & 2, KEY_EPSILON);
    y.store_in(cache.keys + row * HEAD_DIM, cache.key_scale + row);
  } else {
    const X* value = x.value + (token * KV_HEADS + head) * VALUE_DIM;
    Columns<VALUE_DIM> y;
    y.for_each([&](float& x, int column) { x = load(value + column); });
    y.store_in(cache.values + row * VALUE_DIM, cache.value_scale + row);
  }
}
