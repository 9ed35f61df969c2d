// FlashAttention (Dao 2023, arXiv:2307.08691): a block attends with ROWS queries of a key head to the
// keys that they see, or to a split of them: see cuda_combine.cu. A row is a head of the group at one
// time; a warp has ROW_TILES times 16 of them.
//
// HEAD_DIM, VALUE_DIM, GROUP, TIME, HEADS (of keys), PAGE (positions of a page), PAGES (of a
// sequence), WINDOW (0: none), SOFTCAP (0: none), SCALE (of scores) and SINKS describe the layer;
// POSITIONS: keys are not in the order of their positions, which are given, for all sequences at once
// (1) or for each (2). SPLITS, WARPS, ROW_TILES and KEYS (at a time) divide the work. SWIZZLED:
// results are `Swizzled`. `X` and `Stored` are the types of queries and of the cache. ASYNC: copies to
// shared memory need no registers.

constexpr int THREADS = 32 * WARPS, ROWS = 16 * ROW_TILES * WARPS;
constexpr int LENGTH = PAGE * PAGES;                     // positions of a sequence
constexpr int TILES = (TIME * GROUP + ROWS - 1) / ROWS;  // of queries
constexpr int HEAD_STEPS = (HEAD_DIM + 15) / 16, VALUE_STEPS = (VALUE_DIM + 15) / 16;
constexpr int KEY_STEPS = KEYS / 16;
constexpr bool CODES = sizeof(Stored) == 1;
// A few queries stay in registers.
constexpr bool KEPT = ROW_TILES == 1 && HEAD_STEPS <= 8;

struct Memory {
  const Stored *keys, *values;           // [pages, HEADS, PAGE, width]
  const float *key_scale, *value_scale;  // [pages, HEADS, PAGE], of 8-bit caches
  const int* pages;                      // [sequences, PAGES], or null: a sequence has one, its own
  const int* positions;                  // [1 or sequences, LENGTH], or null
};

struct Splits {
  float *sums;          // [SPLITS, sequences, TIME, HEADS, GROUP, VALUE_DIM]
  float *most, *total;  // [SPLITS, sequences, TIME, HEADS, GROUP]
};

// Rows in shared memory are 16 bytes longer than they need: eight of them, one below the other, are
// in different banks.
template <int STEPS>
struct alignas(16) Row {
  u16 at[16 * STEPS + 8];
};

struct Shared {
  Row<HEAD_STEPS> queries[KEPT ? 1 : ROWS], keys[KEYS];
  Row<VALUE_STEPS> values[KEYS];
  float key_scales[CODES ? KEYS : 1], value_scales[CODES ? KEYS : 1];
  int positions[POSITIONS ? KEYS : 1];
};

// Eight neighbors of the cache in the type of the queries.
template <class T>
__device__ inline Words as_queries(const Run<T>& run) {
  Words y;
  for (int i = 0; i < 4; i++) y.at[i] = pack<X>(run.at(2 * i), run.at(2 * i + 1));
  return y;
}

__device__ inline Words as_queries(const Run<X>& run) { return run.words; }

template <class T>
struct Ones;  // in both halves: a number whose last bit counts 1, and -1
template <>
struct Ones<Half> {
  static constexpr u32 LAST_BIT = 0x64006400, MINUS = 0xbc00bc00;
};
template <>
struct Ones<Bfloat16> {
  static constexpr u32 LAST_BIT = 0x43004300, MINUS = 0xbf80bf80;
};

// In a mantissa: the lower bits of the codes, less 128 where the highest bit is set.
__device__ inline Words as_queries(const Run<Int8>& run) {
  Words y;
  for (int i = 0; i < 4; i++) {
    u32 codes = pick_bytes(i < 2 ? run.low : run.high, 0, i % 2 ? 0x4342 : 0x4140);
    u32 lower = (codes & 0x007f007f) | Ones<X>::LAST_BIT;
    u32 highest = (codes & 0x00800080) | Ones<X>::LAST_BIT;
    y.at[i] = multiply_add_pairs<X>(highest, Ones<X>::MINUS, lower);
  }
  return y;
}

// The keys of a sequence and head that some queries may see.
struct Keys {
  const Memory& memory;
  int sequence, head, stop;

  __device__ int position(int key) const {
    if (key >= stop) return -1;
    return POSITIONS ? memory.positions[(POSITIONS > 1 ? sequence * LENGTH : 0) + key] : key;
  }

  // Its row in the cache.
  __device__ int row(int key) const {
    int nth = key < LENGTH ? key / PAGE : PAGES - 1;
    int page = memory.pages ? memory.pages[sequence * PAGES + nth] : sequence;
    return (page * HEADS + head) * PAGE + key - nth * PAGE;
  }
};

// Rows of keys or of values on their way to shared memory. A thread has every THREADS-th run of eight
// elements.
template <int WIDTH, int STEPS>
struct Tile {
  static constexpr int RUNS = WIDTH / 8, COUNT = (KEYS * RUNS + THREADS - 1) / THREADS;
  static constexpr int SCALES = CODES ? (KEYS + THREADS - 1) / THREADS : 1;
#ifndef ASYNC
  Run<Stored> runs[COUNT];
#endif
  float scales[SCALES];

  __device__ static int key(int i) {
    return THREADS % RUNS ? (threadIdx.x + i * THREADS) / RUNS : threadIdx.x / RUNS + i * (THREADS / RUNS);
  }
  __device__ static int column(int i) {
    return 8 * (THREADS % RUNS ? (threadIdx.x + i * THREADS) % RUNS : threadIdx.x % RUNS);
  }
  __device__ static SharedAddress address(Row<STEPS>* to, int i) {
    if (THREADS % RUNS) return shared_address(&to[key(i)].at[column(i)]);
    return shared_address(&to[key(0)].at[column(0)]) + i * (THREADS / RUNS) * (int)sizeof(Row<STEPS>);
  }
  __device__ static bool is_run(int i) { return KEYS * RUNS % THREADS == 0 || key(i) < KEYS; }

  __device__ void start(const Keys& keys, int first, const Stored* from, const float* of_rows,
                        Row<STEPS>* to) {
    constexpr bool ONE_PAGE = PAGE % KEYS == 0;  // has the tile
    int first_row = ONE_PAGE ? keys.row(first) : 0;
    auto row = [&](int key) { return ONE_PAGE ? first_row + key : keys.row(first + key); };
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      if (!is_run(i)) break;
      bool exists = keys.position(first + key(i)) >= 0;
      const Stored* source = from + (long)row(key(i)) * WIDTH + column(i);
#ifdef ASYNC
      start_copy_or_zeros(address(to, i), source, exists);
#else
      runs[i].load(source, exists);
#endif
    }
#ifdef ASYNC
    end_group();
#endif
    for (int i = 0; CODES && i < SCALES; i++) {
      int key = threadIdx.x + i * THREADS;
      scales[i] = key < KEYS && keys.position(first + key) >= 0 ? of_rows[row(key)] : 0;
    }
  }

  __device__ void finish(Row<STEPS>* to, float* to_scales) {
#ifdef ASYNC
    wait_for_groups<0>();
#else
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      if (is_run(i)) *(Words*)&to[key(i)].at[column(i)] = as_queries(runs[i]);
    }
#endif
    for (int i = 0; CODES && i < SCALES; i++) {
      int key = threadIdx.x + i * THREADS;
      if (key < KEYS) to_scales[key] = scales[i];
    }
  }
};

// The queries of a block, of which a thread has one row of each 8.
struct Rows {
  int tile, sequence, head;

  __device__ static bool exists(int row) { return row < TIME * GROUP; }

  // Of the thread: the `i`th.
  __device__ int row(int i) const {
    int warp = threadIdx.x / 32;
    return tile * ROWS + 16 * warp * ROW_TILES + 8 * i + threadIdx.x % 32 / 4;
  }

  // In an array `[sequences, TIME, HEADS, GROUP]`.
  __device__ long index(int row) const {
    long first = ((long)sequence * TIME * HEADS + head) * GROUP;
    return first + (long)(row / GROUP) * HEADS * GROUP + row % GROUP;
  }

  // To the base 2.
  __device__ float sink(const float* sinks, int row) const {
    return sinks[head * GROUP + row % GROUP] * LOG2_E;
  }
};

// Queries for tensor cores, in registers or in shared memory.
struct Queries {
  u32 kept[KEPT ? HEAD_STEPS : 1][4];
  SharedAddress stored;

  __device__ void load(const X* from, const Rows& rows, Shared& shared) {
    int lane = threadIdx.x % 32;
    if (KEPT) {
#pragma unroll
      for (int i = 0; i < (KEPT ? 4 * HEAD_STEPS : 0); i++) {
        int column = 16 * (i / 4) + 8 * (i / 2 % 2) + 2 * (lane % 4), row = rows.row(i % 2);
        const X* pair = from + rows.index(row) * HEAD_DIM + column;
        kept[i / 4][i % 4] = column < HEAD_DIM && rows.exists(row) ? *(const u32*)pair : 0;
      }
      return;
    }
    for (int run = threadIdx.x; run < ROWS * 2 * HEAD_STEPS; run += THREADS) {
      int r = run / (2 * HEAD_STEPS), column = run % (2 * HEAD_STEPS) * 8;
      int row = rows.tile * ROWS + r;
      const X* eight = from + rows.index(row) * HEAD_DIM + column;
      bool exists = column < HEAD_DIM && rows.exists(row);
      *(Words*)&shared.queries[r].at[column] = exists ? *(const Words*)eight : Words{};
    }
    int first = 16 * warp_index() * ROW_TILES + lane % 16;
    stored = shared_address(&shared.queries[KEPT ? 0 : first].at[8 * (lane / 16)]);
  }

  // 16 columns of 16 rows.
  __device__ void get(u32* y, int tile, int step) const {
    for (int j = 0; KEPT && j < 4; j++) y[j] = kept[KEPT ? step : 0][j];
    if (!KEPT) load_matrices(y, stored + 16 * tile * (int)sizeof(Row<HEAD_STEPS>) + 32 * step);
  }
};

// Of the rows of a thread and, of each eight keys, two.
struct Scores {
  float at[ROW_TILES][2 * KEY_STEPS][4] = {};

  __device__ void multiply(const Queries& queries, const Shared& shared) {
    int lane = threadIdx.x % 32;
    SharedAddress first = shared_address(&shared.keys[8 * (lane / 16) + lane % 8].at[lane / 8 % 2 * 8]);
#pragma unroll
    for (int step = 0; step < HEAD_STEPS; step++) {
      u32 rows[ROW_TILES][4];
#pragma unroll
      for (int i = 0; i < ROW_TILES; i++) queries.get(rows[i], i, step);
#pragma unroll
      for (int j = 0; j < KEY_STEPS; j++) {
        u32 keys[4];
        load_matrices(keys, first + 16 * j * (int)sizeof(Row<HEAD_STEPS>) + 32 * step);
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++) {
          multiply_add<X>(at[i][2 * j], rows[i], keys);
          multiply_add<X>(at[i][2 * j + 1], rows[i], keys + 2);
        }
      }
    }
  }

  // Calls `function(score, i, key)`, the row being the `i`th.
  template <class Function>
  __device__ void for_each(Function function) {
#pragma unroll
    for (int j = 0; j < 4 * KEY_STEPS; j++) {
      int key = 8 * (j / 2) + 2 * (threadIdx.x % 4) + j % 2;
#pragma unroll
      for (int i = 0; i < 2 * ROW_TILES; i++) function(of(i, j), i, key);
    }
  }

  __device__ float& of(int i, int j) { return at[i / 2][j / 2][2 * (i % 2) + j % 2]; }
};

// The online softmax of a thread's rows over the keys so far (Milakov & Gimelshein 2018,
// arXiv:1805.02867).
struct State {
  float most[2 * ROW_TILES], total[2 * ROW_TILES] = {};
  float sums[ROW_TILES][2 * VALUE_STEPS][4] = {};

  __device__ State() {
    for (int i = 0; i < 2 * ROW_TILES; i++) most[i] = MASKED;
  }

  // Scores to weights, relative to the largest so far; `factor`: of the scores.
  __device__ void weigh(Scores& scores, float factor) {
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) {
      float largest = scores.of(i, 0), sum = 0;
#pragma unroll
      for (int j = 1; j < 4 * KEY_STEPS; j++) largest = fmaxf(scores.of(i, j), largest);
      for (int d = 1; d < 4; d *= 2) largest = fmaxf(exchange(largest, d), largest);
      largest = fmaxf(most[i], largest * factor);
      float rescale = power_of_two(most[i] - largest);
      most[i] = largest;
#pragma unroll
      for (int j = 0; j < 4 * KEY_STEPS; j++) {
        float weight = power_of_two(scores.of(i, j) * factor - largest);
        scores.of(i, j) = weight;
        sum += weight;
      }
      total[i] = total[i] * rescale + sum;
#pragma unroll
      for (int j = 0; j < 4 * VALUE_STEPS; j++) sums[i / 2][j / 2][2 * (i % 2) + j % 2] *= rescale;
    }
  }

  __device__ void add(const Scores& weights, const Shared& shared) {
    int lane = threadIdx.x % 32;
    SharedAddress first = shared_address(&shared.values[lane % 16].at[8 * (lane / 16)]);
#pragma unroll
    for (int step = 0; step < KEY_STEPS; step++) {
      u32 rows[ROW_TILES][4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int j = 2 * step + i / 2, key = 8 * j + 2 * (lane % 4);
        float scales[2] = {1, 1};
        for (int k = 0; CODES && k < 2; k++) scales[k] = shared.value_scales[key + k];
#pragma unroll
        for (int k = 0; k < ROW_TILES; k++) {
          const float* pair = weights.at[k][j] + 2 * (i % 2);
          rows[k][i] = pack<X>(pair[0] * scales[0], pair[1] * scales[1]);
        }
      }
#pragma unroll
      for (int j = 0; j < VALUE_STEPS; j++) {
        u32 values[4];
        load_transposed(values, first + 16 * step * (int)sizeof(Row<VALUE_STEPS>) + 32 * j);
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++) {
          multiply_add<X>(sums[i][2 * j], rows[i], values);
          multiply_add<X>(sums[i][2 * j + 1], rows[i], values + 2);
        }
      }
    }
  }

  // Calls `function(column, pair)` for neighboring columns of the `i`th row.
  template <class Function>
  __device__ void for_each_pair(int i, Function function) const {
#pragma unroll
    for (int j = 0; j < 2 * VALUE_STEPS; j++) {
      int column = 8 * j + 2 * (threadIdx.x % 4);
      if (VALUE_DIM % 16 == 0 || column < VALUE_DIM) function(column, sums[i / 2][j] + 2 * (i % 2));
    }
  }
};

// Where two neighbors of a head of a query are in the results.
__device__ inline X* result(X* out, long head, int column, int sequences) {
  if (!SWIZZLED) return out + head * VALUE_DIM + column;
  constexpr int ALL_HEADS = HEADS * GROUP;
  int row = head / ALL_HEADS, first = head % ALL_HEADS * VALUE_DIM;
  return Swizzled<X>{out}.pair(row, first + column, sequences * TIME);
}

__device__ inline void attend(const X* queries, const int* positions, const Memory& memory,
                              const float* sinks, const Splits& splits, X* out) {
  Shared& shared = *(Shared*)dynamic_shared;
  int sequences = gridDim.x / HEADS, split = blockIdx.z, thread = threadIdx.x;
  // The last queries see the most keys: they start first.
  Rows rows = {TILES - 1 - (int)blockIdx.y, (int)blockIdx.x / HEADS, (int)blockIdx.x % HEADS};
  positions += rows.sequence * TIME;
  long all = (long)sequences * TIME * HEADS * GROUP;

  int least = LENGTH, last = -1;  // positions
  for (int i = thread % 32; i <= (ROWS - 1) / GROUP + 1; i += 32) {
    int time = rows.tile * ROWS / GROUP + i;
    if (time >= TIME || time * GROUP >= (rows.tile + 1) * ROWS) continue;
    least = min(positions[time], least), last = max(positions[time], last);
  }
  for (int d = 16; d; d /= 2) {
    least = min(exchange(least, d), least);
    last = max(exchange(last, d), last);
  }
  int filled = POSITIONS ? LENGTH : min(last + 1, LENGTH);
  int share = (filled + SPLITS * KEYS - 1) / (SPLITS * KEYS) * KEYS;
  int used = filled ? (filled + share - 1) / share : 1;
  if (split >= used) {  // sees no key
    for (int i = 0; i < 2 * ROW_TILES; i++) {
      long at = split * all + rows.index(rows.row(i));
      if (rows.exists(rows.row(i)) && thread % 4 == 0) splits.most[at] = MASKED, splits.total[at] = 0;
    }
    return;
  }
  int start = split * share, stop = min(start + share, filled);
  // Up to here, all queries see all keys.
  int unmasked = POSITIONS || WINDOW ? 0 : min(least + 1, stop);
  Keys keys = {memory, rows.sequence, rows.head, stop};
  int position[2 * ROW_TILES];
#pragma unroll
  for (int i = 0; i < 2 * ROW_TILES; i++) {
    position[i] = rows.exists(rows.row(i)) ? positions[rows.row(i) / GROUP] : -1;
  }

  Queries of_rows;
  of_rows.load(queries, rows, shared);
  for (int i = thread; HEAD_DIM % 16 && i < KEYS; i += THREADS) {
    *(Words*)&shared.keys[i].at[HEAD_DIM] = Words{};
  }
  State state;
  constexpr float FACTOR = SOFTCAP > 0 ? 1 : SCALE * LOG2_E;
  Tile<HEAD_DIM, HEAD_STEPS> next_keys;
  Tile<VALUE_DIM, VALUE_STEPS> next_values;
  next_keys.start(keys, start, memory.keys, memory.key_scale, shared.keys);
#pragma unroll 1
  for (int first = start; first < stop; first += KEYS) {
    next_keys.finish(shared.keys, shared.key_scales);
    for (int i = thread; POSITIONS && i < KEYS; i += THREADS) {
      shared.positions[i] = keys.position(first + i);
    }
    __syncthreads();
    next_values.start(keys, first, memory.values, memory.value_scale, shared.values);
    Scores scores;
    scores.multiply(of_rows, shared);
    if (CODES || SOFTCAP > 0) {
      scores.for_each([&](float& score, int, int key) {
        if (CODES) score *= shared.key_scales[key];
        if (SOFTCAP > 0) score = SOFTCAP * LOG2_E * tanhf(score * (SCALE / SOFTCAP));
      });
    }
    if (first + KEYS > unmasked) {
      scores.for_each([&](float& score, int i, int key) {
        int at = POSITIONS ? shared.positions[key] : first + key < stop ? first + key : -1;
        int distance = position[i] - at;
        bool seen = at >= 0 && distance >= 0 && (!WINDOW || distance < WINDOW);
        score = seen ? score : 2 * MASKED / FACTOR;
      });
    }
    state.weigh(scores, FACTOR);
    next_values.finish(shared.values, shared.value_scales);
    __syncthreads();
    if (first + KEYS < stop) {
      next_keys.start(keys, first + KEYS, memory.keys, memory.key_scale, shared.keys);
    }
    state.add(scores, shared);
  }

#pragma unroll
  for (int i = 0; i < 2 * ROW_TILES; i++) {
    int row = rows.row(i);
    float most = state.most[i], total = state.total[i];
    for (int d = 1; d < 4; d *= 2) total += exchange(total, d);
    if (!rows.exists(row)) continue;
    if (SPLITS > 1) {
      long at = split * all + rows.index(row);
      if (thread % 4 == 0) splits.most[at] = most, splits.total[at] = total;
      state.for_each_pair(i, [&](int column, const float* pair) {
        for (int j = 0; j < 2; j++) splits.sums[at * VALUE_DIM + column + j] = pair[j];
      });
    } else {
      float sink = SINKS ? rows.sink(sinks, row) : MASKED, largest = fmaxf(sink, most);
      float factor = SINKS ? power_of_two(most - largest) : 1;
      total = total * factor + (SINKS ? power_of_two(sink - largest) : 0);
      factor /= fmaxf(total, 1e-30f);
      state.for_each_pair(i, [&](int column, const float* pair) {
        X* to = result(out, rows.index(row), column, sequences);
        *(u32*)to = pack<X>(pair[0] * factor, pair[1] * factor);
      });
    }
  }
}
