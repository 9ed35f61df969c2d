// FlashAttention (Dao 2023, arXiv:2307.08691): a block attends with ROWS queries of a key head to the
// keys that they see, or to a split of them; the last block of some queries to finish combines the
// splits. A row is a head of the group at one time; a warp has ROW_TILES times 16 of them.
//
// HEAD_DIM, VALUE_DIM, GROUP, TIME, HEADS (of keys), PAGE (positions of a page), PAGES (of a
// sequence), WINDOW (0: none), SOFTCAP (0: none), SCALE (of scores) and SINKS describe the layer;
// POSITIONS: keys are not in the order of their positions, which are given, for all sequences at once
// (1) or for each (2). SPLITS, WARPS, ROW_TILES and KEYS (at a time) divide the work. `X` and
// `Stored` are the types of queries and of the cache. ASYNC: copies to shared memory need no
// registers.

constexpr int THREADS = 32 * WARPS, ROWS = 16 * ROW_TILES * WARPS;
constexpr int LENGTH = PAGE * PAGES;                     // positions of a sequence
constexpr int TILES = (TIME * GROUP + ROWS - 1) / ROWS;  // of queries
constexpr int HEAD_STEPS = (HEAD_DIM + 15) / 16, VALUE_STEPS = (VALUE_DIM + 15) / 16;
constexpr int KEY_STEPS = KEYS / 16;
constexpr bool CODES = sizeof(Stored) == 1;
// A few queries stay in registers.
constexpr bool KEPT = ROW_TILES == 1 && HEAD_STEPS <= 8;
constexpr float LOG2_E = 1.4426950408889634f, MASKED = -1e30f;

struct Memory {
  const Stored *keys, *values;           // [pages, HEADS, PAGE, width]
  const float *key_scale, *value_scale;  // [pages, HEADS, PAGE], of 8-bit caches
  const int* pages;                      // [sequences, PAGES], or null: a sequence has one, its own
  const int* positions;                  // [1 or sequences, LENGTH], or null
};

struct Splits {
  float *sums;          // [SPLITS, sequences, TIME, HEADS, GROUP, VALUE_DIM]
  float *most, *total;  // [SPLITS, sequences, TIME, HEADS, GROUP]
  int* finished;        // [TILES, sequences, HEADS]
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

// What a thread has of the queries: of each 16 rows, one and the one eight below.
struct Rows {
  int first;    // row
  long before;  // rows of earlier sequences and heads

  __device__ int row(int i) const { return first + 16 * (i / 2) + 8 * (i % 2); }

  // Of an array `[sequences, TIME, HEADS, GROUP]`.
  __device__ long index(int r) const {
    return before + (long)(r / GROUP) * HEADS * GROUP + r % GROUP;
  }
};

__device__ inline bool is_row(int row) { return row < TIME * GROUP; }

// Calls `function(score, i, key)` for the rows and keys of a thread: of each eight keys, it has two.
template <class Function>
__device__ inline void for_each(float (&scores)[ROW_TILES][2 * KEY_STEPS][4], Function function) {
#pragma unroll
  for (int j = 0; j < 4 * KEY_STEPS; j++) {
    int key = 8 * (j / 2) + 2 * (threadIdx.x % 4) + j % 2;
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) {
      function(scores[i / 2][j / 2][2 * (i % 2) + j % 2], i, key);
    }
  }
}

struct State {
  float most[ROW_TILES][2], total[ROW_TILES][2] = {};
  float sums[ROW_TILES][2 * VALUE_STEPS][4] = {};

  // Scores to weights, relative to the largest score so far.
  __device__ void weigh(float (&scores)[ROW_TILES][2 * KEY_STEPS][4], float factor) {
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) {
      float largest = scores[i / 2][0][2 * (i % 2)], sum = 0;
#pragma unroll
      for (int j = 1; j < 4 * KEY_STEPS; j++) {
        largest = fmaxf(scores[i / 2][j / 2][2 * (i % 2) + j % 2], largest);
      }
      for (int d = 1; d < 4; d *= 2) largest = fmaxf(exchange(largest, d), largest);
      float& before = most[i / 2][i % 2];
      largest = fmaxf(before, largest * factor);
      float rescale = power_of_two(before - largest);
      before = largest;
#pragma unroll
      for (int j = 0; j < 4 * KEY_STEPS; j++) {
        float& score = scores[i / 2][j / 2][2 * (i % 2) + j % 2];
        score = power_of_two(score * factor - largest);
        sum += score;
      }
      total[i / 2][i % 2] = total[i / 2][i % 2] * rescale + sum;
#pragma unroll
      for (int j = 0; j < 4 * VALUE_STEPS; j++) sums[i / 2][j / 2][2 * (i % 2) + j % 2] *= rescale;
    }
  }
};

__device__ inline void attend(const X* queries, const int* positions, const Memory& memory,
                              const float* sinks, const Splits& splits, X* out) {
  Shared& shared = *(Shared*)dynamic_shared;
  int head = blockIdx.x % HEADS, sequence = blockIdx.x / HEADS, sequences = gridDim.x / HEADS;
  // The last queries see the most keys: they start first.
  int tile = TILES - 1 - blockIdx.y / SPLITS, split = blockIdx.y % SPLITS;
  int thread = threadIdx.x, lane = thread % 32, warp = warp_index(), member = lane % 4;
  positions += sequence * TIME;

  int least = LENGTH, last = -1;  // positions
  for (int i = lane; i <= (ROWS - 1) / GROUP + 1; i += 32) {
    int time = tile * ROWS / GROUP + i;
    if (time >= TIME || time * GROUP >= (tile + 1) * ROWS) continue;
    least = min(positions[time], least), last = max(positions[time], last);
  }
  for (int d = 16; d; d /= 2) least = min(exchange(least, d), least), last = max(exchange(last, d), last);

  int filled = POSITIONS || last >= LENGTH ? LENGTH : last + 1;
  int share = (filled + SPLITS * KEYS - 1) / (SPLITS * KEYS) * KEYS;
  int used = filled ? (filled + share - 1) / share : 1;
  if (split >= used) return;
  int start = split * share, stop = start + share < filled ? start + share : filled;
  // Up to here, all queries see all keys.
  int unmasked = POSITIONS || WINDOW ? 0 : least + 1 < stop ? least + 1 : stop;
  Keys keys = {memory, sequence, head, stop};

  Rows rows = {tile * ROWS + 16 * warp * ROW_TILES + lane / 4,
               ((long)sequence * TIME * HEADS + head) * GROUP};
  int position[2 * ROW_TILES];
#pragma unroll
  for (int i = 0; i < 2 * ROW_TILES; i++) {
    position[i] = is_row(rows.row(i)) ? positions[rows.row(i) / GROUP] : -1;
  }
  u32 kept[KEPT ? HEAD_STEPS : 1][4];
  if (KEPT) {
#pragma unroll
    for (int i = 0; i < 4 * HEAD_STEPS; i++) {
      int column = 16 * (i / 4) + 8 * (i / 2 % 2) + 2 * member, r = rows.row(i % 2);
      const X* from = queries + rows.index(r) * HEAD_DIM + column;
      if (KEPT) kept[i / 4][i % 4] = column < HEAD_DIM && is_row(r) ? *(const u32*)from : 0;
    }
  } else {
    for (int run = thread; run < ROWS * 2 * HEAD_STEPS; run += THREADS) {
      int r = run / (2 * HEAD_STEPS), column = run % (2 * HEAD_STEPS) * 8, of = tile * ROWS + r;
      const X* from = queries + rows.index(of) * HEAD_DIM + column;
      Words words = column < HEAD_DIM && is_row(of) ? *(const Words*)from : Words{};
      *(Words*)&shared.queries[r].at[column] = words;
    }
  }
  if (HEAD_DIM % 16) {
    for (int i = thread; i < KEYS; i += THREADS) *(Words*)&shared.keys[i].at[HEAD_DIM] = Words{};
  }

  // What a thread loads for tensor cores: of 16 rows, eight elements of the 16 in a step.
  SharedAddress queries_at =
      shared_address(&shared.queries[KEPT ? 0 : 16 * warp * ROW_TILES + lane % 16].at[8 * (lane / 16)]);
  SharedAddress keys_at =
      shared_address(&shared.keys[8 * (lane / 16) + lane % 8].at[8 * (lane / 8 % 2)]);
  SharedAddress values_at = shared_address(&shared.values[lane % 16].at[8 * (lane / 16)]);

  State state;
#pragma unroll
  for (int i = 0; i < 2 * ROW_TILES; i++) state.most[i / 2][i % 2] = MASKED;
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

    float scores[ROW_TILES][2 * KEY_STEPS][4] = {};
#pragma unroll
    for (int step = 0; step < HEAD_STEPS; step++) {
      u32 of_rows[ROW_TILES][4];
#pragma unroll
      for (int i = 0; i < ROW_TILES; i++) {
        if (KEPT) {
          for (int j = 0; j < 4; j++) of_rows[i][j] = kept[KEPT ? step : 0][j];
        } else {
          load_matrices(of_rows[i], queries_at + 16 * i * (int)sizeof(Row<HEAD_STEPS>) + 32 * step);
        }
      }
#pragma unroll
      for (int j = 0; j < KEY_STEPS; j++) {
        u32 of_keys[4];
        load_matrices(of_keys, keys_at + 16 * j * (int)sizeof(Row<HEAD_STEPS>) + 32 * step);
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++) {
          multiply_add<X>(scores[i][2 * j], of_rows[i], of_keys);
          multiply_add<X>(scores[i][2 * j + 1], of_rows[i], of_keys + 2);
        }
      }
    }
    for_each(scores, [&](float& score, int i, int key) {
      if (CODES) score *= shared.key_scales[key];
      if (SOFTCAP > 0) score = SOFTCAP * LOG2_E * tanhf(score * (SCALE / SOFTCAP));
    });
    if (first + KEYS > unmasked) {
      for_each(scores, [&](float& score, int i, int key) {
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
#pragma unroll
    for (int step = 0; step < KEY_STEPS; step++) {
      u32 weights[ROW_TILES][4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int j = 2 * step + i / 2, key = 8 * j + 2 * member;
        float first_scale = CODES ? shared.value_scales[key] : 1;
        float second_scale = CODES ? shared.value_scales[key + 1] : 1;
#pragma unroll
        for (int k = 0; k < ROW_TILES; k++) {
          const float* pair = scores[k][j] + 2 * (i % 2);
          weights[k][i] = pack<X>(pair[0] * first_scale, pair[1] * second_scale);
        }
      }
#pragma unroll
      for (int j = 0; j < VALUE_STEPS; j++) {
        u32 of_values[4];
        load_transposed(of_values, values_at + 16 * step * (int)sizeof(Row<VALUE_STEPS>) + 32 * j);
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++) {
          multiply_add<X>(state.sums[i][2 * j], weights[i], of_values);
          multiply_add<X>(state.sums[i][2 * j + 1], weights[i], of_values + 2);
        }
      }
    }
  }

  long all = (long)sequences * TIME * HEADS * GROUP;
#pragma unroll
  for (int i = 0; i < 2 * ROW_TILES; i++) {
    int r = rows.row(i);
    float most = state.most[i / 2][i % 2], total = state.total[i / 2][i % 2], factor = 1;
    for (int d = 1; d < 4; d *= 2) total += exchange(total, d);
    if (!is_row(r)) continue;
    long at = rows.index(r);
    if (SPLITS > 1) {
      at += split * all;
      if (member == 0) splits.most[at] = most, splits.total[at] = total;
    } else {
      if (SINKS) {
        float sink = sinks[head * GROUP + r % GROUP] * LOG2_E, largest = fmaxf(sink, most);
        factor = power_of_two(most - largest);
        total = total * factor + power_of_two(sink - largest);
      }
      factor /= total < 1e-30f ? 1e-30f : total;
    }
#pragma unroll
    for (int j = 0; j < 2 * VALUE_STEPS; j++) {
      int column = 8 * j + 2 * member;
      const float* pair = state.sums[i / 2][j] + 2 * (i % 2);
      if (column >= VALUE_DIM) continue;
      if (SPLITS > 1) {
        float* to = splits.sums + at * VALUE_DIM + column;
        to[0] = pair[0], to[1] = pair[1];
      } else {
        *(u32*)(out + at * VALUE_DIM + column) = pack<X>(pair[0] * factor, pair[1] * factor);
      }
    }
  }
  if (SPLITS == 1) return;

  __shared__ bool is_last;
  fence();
  __syncthreads();
  if (thread == 0) {
    int* finished = splits.finished + (tile * sequences + sequence) * HEADS + head;
    is_last = used == 1 || atomic_add(finished, 1) == used - 1;
    if (is_last) *finished = 0;
  }
  __syncthreads();
  if (!is_last) return;
  fence();
  for (int pair = thread; pair < ROWS * VALUE_DIM / 2; pair += THREADS) {
    int r = tile * ROWS + pair / (VALUE_DIM / 2), column = 2 * (pair % (VALUE_DIM / 2));
    if (!is_row(r)) continue;
    float sink = SINKS ? sinks[head * GROUP + r % GROUP] * LOG2_E : MASKED, largest = sink;
    for (int i = 0; i < used; i++) {
      largest = fmaxf(fresh(splits.most + rows.index(r) + i * all), largest);
    }
    float total = SINKS ? power_of_two(sink - largest) : 0, y[2] = {};
    for (int i = 0; i < used; i++) {
      long at = rows.index(r) + i * all;
      float weight = power_of_two(fresh(splits.most + at) - largest);
      total += weight * fresh(splits.total + at);
      for (int j = 0; j < 2; j++) y[j] += weight * fresh(splits.sums + at * VALUE_DIM + column + j);
    }
    float factor = 1 / (total < 1e-30f ? 1e-30f : total);
    *(u32*)(out + rows.index(r) * VALUE_DIM + column) = pack<X>(y[0] * factor, y[1] * factor);
  }
}
