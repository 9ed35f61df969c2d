// Decode attention: heads are normalized and rotated, the new token goes to the cache, and a block
// attends to a split of the keys with all query heads of a key head. The last block of a head to
// finish combines the splits (Dao et al. 2023, "Flash-Decoding").
//
// Key 0 is the new token itself; key i + 1 is index i of the cache.
//
// HEAD_DIM, VALUE_DIM, GROUP, SPLITS, PARTS, PAGE (positions of a page), PAGES (of a sequence),
// TILE (keys at a time), WINDOW (0: none), SOFTCAP (0: none), SCALE (of scores), NORMS, EPSILONS and SINKS describe the
// layer; `Projected` and `Stored` are the types of projections and of the cache.

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int LANES = 8;              // threads of a key
constexpr int LENGTH = PAGE * PAGES;  // positions of a sequence
constexpr int HEADS = (GROUP + WARPS) / WARPS * WARPS;  // of queries and the key, padded

struct Token {
  const Projected *query, *key, *value;  // [PARTS, sequences, heads, width]
  const float *cos, *sin;                // [sequences, HEAD_DIM]
  const float *query_scale, *key_scale, *sinks;
  const float *query_bias, *key_bias, *value_bias;  // [heads, width], or null
};

struct Splits {
  float *sums;          // [SPLITS, sequences, heads, GROUP, VALUE_DIM]
  float *most, *total;  // [SPLITS, sequences, heads, GROUP]
  int* finished;        // [sequences, heads]
};

// The sum of the parts of an element of a projection, at `first + i`, and its bias.
__device__ inline float projected(const Projected* x, const float* bias, long first, int i,
                                  long stride) {
  float y = load(x + first + i);
  for (int part = 1; part < PARTS; part++) y += load(x + part * stride + first + i);
  return bias ? y + bias[i] : y;
}

// Of the elements of a head, of an 8-bit cache.
__device__ inline u32 largest(const float* x, int width) {
  u32 most = 0;
#pragma unroll 1
  for (int i = 0; CODES && i < width; i++) most = max(most, magnitude(x[i]));
  return most;
}

template <class Out>
__device__ void attend(const Token& token, const int* positions, const int* pages,
                       const Cache& cache, const Splits& splits, const Out& out) {
  int head = blockIdx.x, heads = gridDim.x, sequence = blockIdx.y, sequences = gridDim.y;
  int split = blockIdx.z, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  int position = positions[sequence];
  int keys = (position < 0 ? 0 : position < LENGTH ? position : LENGTH) + 1;
  int share = (keys + SPLITS - 1) / SPLITS;
  share = (share + TILE - 1) / TILE * TILE;
  int used = (keys + share - 1) / share, start = split * share;
  int stop = start + share < keys ? start + share : keys;
  if (split >= used) return;

  __shared__ float query[HEADS][HEAD_DIM], key[HEAD_DIM], value[VALUE_DIM];
  __shared__ float scores[HEADS][TILE], rescale[HEADS], value_scales[TILE];
  __shared__ float shares[THREADS / (VALUE_DIM / 8)][VALUE_DIM];
  __shared__ int rows[TILE], last;

  // Heads: queries, then the key.
  for (int h = warp; h < HEADS; h += WARPS) {
    bool is_key = h == GROUP, exists = h <= GROUP;
    const Projected* from = is_key ? token.key : token.query;
    const float* bias = is_key ? token.key_bias : token.query_bias;
    long count = (long)heads * (is_key ? 1 : GROUP), stride = sequences * count * HEAD_DIM;
    int of_token = is_key ? head : head * GROUP + h;
    long base = (sequence * count + of_token) * HEAD_DIM;
    if (bias) bias += of_token * HEAD_DIM;
    float x[(HEAD_DIM + 31) / 32], y[(HEAD_DIM + 31) / 32], squares = 0;
#pragma unroll
    for (int i = 0; i < (HEAD_DIM + 31) / 32; i++) {
      int column = lane + 32 * i, other = partner(column);
      bool here = exists && column < HEAD_DIM;
      x[i] = here ? projected(from, bias, base, column, stride) : 0;
      y[i] = here ? projected(from, bias, base, other, stride) : 0;
      squares += x[i] * x[i];
    }
    if (NORMS) {
      for (int d = 16; d; d /= 2) squares += exchange(squares, d);
    }
    bool normed = is_key ? NORMS & 2 : NORMS & 1;
    float factor = normed ? inverse_root(squares / HEAD_DIM + (is_key ? KEY_EPSILON : QUERY_EPSILON)) : 1;
    const float* scale = is_key ? token.key_scale : token.query_scale;
#pragma unroll
    for (int i = 0; i < (HEAD_DIM + 31) / 32; i++) {
      int column = lane + 32 * i, other = partner(column);
      if (!exists || column >= HEAD_DIM) continue;
      float a = x[i] * factor, b = y[i] * factor;
      if (normed && scale) a *= scale[column], b *= scale[other];
      long at = (long)sequence * HEAD_DIM + column;
      a = a * token.cos[at] + b * token.sin[at];
      if (is_key) {
        key[column] = a;
      } else {
        query[h][column] = a * (SOFTCAP > 0 ? SCALE / SOFTCAP : SCALE * LOG2_E);
      }
    }
  }
  if (split == 0) {
    long stride = (long)sequences * heads * VALUE_DIM;
    long base = ((long)sequence * heads + head) * VALUE_DIM;
    const float* bias = token.value_bias ? token.value_bias + head * VALUE_DIM : 0;
    for (int i = thread; i < VALUE_DIM; i += THREADS) {
      value[i] = projected(token.value, bias, base, i, stride);
    }
  }
  __syncthreads();

  // The new token, as attention will read it from the cache.
  if (split == 0) {
    float key_scale = scale_of(largest(key, HEAD_DIM)), value_scale = scale_of(largest(value, VALUE_DIM));
    bool stored = position >= 0 && (WINDOW || position < LENGTH);
    int index = (position < 0 ? 0 : position) % LENGTH;
    long row = ((long)pages[sequence * PAGES + index / PAGE] * heads + head) * PAGE + index % PAGE;
    __syncthreads();
    for (int i = thread; i < HEAD_DIM; i += THREADS) {
      Stored y;
      store_scaled(&y, key[i], key_scale);
      if (stored) cache.keys[row * HEAD_DIM + i] = y;
      key[i] = load(&y) * key_scale;
    }
    for (int i = thread; i < VALUE_DIM; i += THREADS) {
      Stored y;
      store_scaled(&y, value[i], value_scale);
      if (stored) cache.values[row * VALUE_DIM + i] = y;
      value[i] = load(&y) * value_scale;
    }
    if (stored && thread == 0 && cache.key_scale) {
      cache.key_scale[row] = key_scale;
      cache.value_scale[row] = value_scale;
    }
    __syncthreads();
  }

  // Keys and values of a tile are all requested before any is used: LANES threads have a key, each
  // every LANES-th run of 8 elements; RUNS threads have a value, each a run of it.
  constexpr int KEY_RUNS = HEAD_DIM / 8, MINE = (KEY_RUNS + LANES - 1) / LANES;
  constexpr int ROUNDS = TILE * LANES / THREADS, RUNS = VALUE_DIM / 8;
  constexpr int TEAMS = THREADS / RUNS, VALUES = (TILE + TEAMS - 1) / TEAMS;
  static_assert(THREADS % RUNS == 0, "threads share values evenly");
  int part = thread % LANES, run = thread % RUNS, team = thread / RUNS;
  float most[HEADS / WARPS], total[HEADS / WARPS], sums[8][GROUP] = {};
  for (int i = 0; i < HEADS / WARPS; i++) most[i] = MASKED, total[i] = 0;

#pragma unroll 1
  for (int first = start; first < stop; first += TILE) {
    for (int slot = thread; slot < TILE; slot += THREADS) {
      int k = first + slot, index = k - 1;
      bool visible = k < stop;
      if (WINDOW && k > 0) {
        int distance = position % LENGTH - index;
        if (distance < 0) distance += LENGTH;
        visible = visible && distance > 0 && distance < WINDOW && distance <= position;
      }
      int page = visible && k > 0 ? pages[sequence * PAGES + index / PAGE] : 0;
      // Of the cache; -1: the new token, -2: masked.
      rows[slot] = !visible ? -2 : k == 0 ? -1 : (page * heads + head) * PAGE + index % PAGE;
    }
    __syncthreads();
    Run<Stored> keys[ROUNDS][MINE], values[VALUES];
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
      int row = rows[round * (THREADS / LANES) + thread / LANES];
#pragma unroll
      for (int i = 0; i < MINE; i++) {
        int at = part + i * LANES;
        bool here = row >= 0 && at < KEY_RUNS;
        keys[round][i].load(cache.keys + (here ? (long)row * HEAD_DIM + 8 * at : 0), here);
      }
    }
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
      int slot = team + i * TEAMS, row = slot < TILE ? rows[slot] : -2;
      values[i].load(cache.values + (row < 0 ? 0 : (long)row * VALUE_DIM + 8 * run), row >= 0);
    }
    // Scores.
    float dots[ROUNDS][GROUP] = {};
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      int at = part + i * LANES;
      if (at >= KEY_RUNS) continue;
#pragma unroll
      for (int g = 0; g < GROUP; g++) {
        float q[8];
#pragma unroll
        for (int j = 0; j < 8; j++) q[j] = query[g][8 * at + j];
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
#pragma unroll
          for (int j = 0; j < 8; j++) dots[round][g] += q[j] * keys[round][i].at(j);
        }
      }
    }
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
      int slot = round * (THREADS / LANES) + thread / LANES, row = rows[slot];
      float scale = row >= 0 && cache.key_scale ? cache.key_scale[row] : 1;
      if (row == -1) {  // it is in no cache yet, for other blocks to see
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
          dots[round][g] = 0;
#pragma unroll 1
          for (int at = 8 * part; at < HEAD_DIM; at += 8 * LANES) {
            for (int j = 0; j < 8; j++) dots[round][g] += query[g][at + j] * key[at + j];
          }
        }
      }
#pragma unroll
      for (int g = 0; g < GROUP; g++) {
        float dot = dots[round][g];
        for (int d = LANES / 2; d; d /= 2) dot += exchange(dot, d);
        float score = dot * scale;
        if (SOFTCAP > 0) score = SOFTCAP * LOG2_E * tanhf(score);
        if (part == g % LANES) scores[g][slot] = row == -2 ? MASKED : score;
      }
      if (part == 0) value_scales[slot] = row >= 0 && cache.value_scale ? cache.value_scale[row] : 1;
    }
    __syncthreads();
    // Weights.
#pragma unroll
    for (int i = 0; i < HEADS / WARPS; i++) {
      int g = i * WARPS + warp;
      float s[TILE / 32], largest = most[i], sum = 0;
      for (int j = 0; j < TILE / 32; j++) {
        s[j] = g < GROUP ? scores[g][lane + 32 * j] : MASKED;
        largest = s[j] > largest ? s[j] : largest;
      }
      for (int d = 16; d; d /= 2) {
        float other = exchange(largest, d);
        largest = other > largest ? other : largest;
      }
      for (int j = 0; j < TILE / 32; j++) {
        float weight = s[j] <= MASKED ? 0 : exp2f(s[j] - largest);
        sum += weight;
        if (g < GROUP) scores[g][lane + 32 * j] = weight * value_scales[lane + 32 * j];
      }
      for (int d = 16; d; d /= 2) sum += exchange(sum, d);
      float factor = exp2f(most[i] - largest);
      total[i] = total[i] * factor + sum;
      most[i] = largest;
      if (lane == 0) rescale[g] = factor;
    }
    __syncthreads();
    // Values.
#pragma unroll
    for (int g = 0; g < GROUP; g++) {
#pragma unroll
      for (int j = 0; j < 8; j++) sums[j][g] *= rescale[g];
    }
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
      int slot = team + i * TEAMS, row = slot < TILE ? rows[slot] : -2;
      if (row == -2) continue;  // what is masked may not be finite
#pragma unroll
      for (int j = 0; j < 8; j++) {
        float x = row == -1 ? value[8 * run + j] : values[i].at(j);
#pragma unroll
        for (int g = 0; g < GROUP; g++) sums[j][g] += scores[g][slot] * x;
      }
    }
    __syncthreads();
  }

  // Sums over the teams, a head at a time.
#pragma unroll
  for (int g = 0; g < GROUP; g++) {
#pragma unroll
    for (int j = 0; j < 8; j++) shares[team][8 * run + j] = sums[j][g];
    __syncthreads();
    for (int column = thread; column < VALUE_DIM; column += THREADS) {
      float y = 0;
      for (int i = 0; i < TEAMS; i++) y += shares[i][column];
      long state = ((long)split * sequences + sequence) * heads + head;
      splits.sums[(state * GROUP + g) * VALUE_DIM + column] = y;
    }
    __syncthreads();
  }

  // The state of this split.
  long state = ((long)split * sequences + sequence) * heads + head;
#pragma unroll
  for (int i = 0; i < HEADS / WARPS; i++) {
    int g = i * WARPS + warp;
    if (lane == 0 && g < GROUP) {
      splits.most[state * GROUP + g] = most[i];
      splits.total[state * GROUP + g] = total[i];
    }
  }
  fence();
  __syncthreads();
  int* finished = splits.finished + sequence * heads + head;
  if (thread == 0) {
    last = used == 1 || atomic_add(finished, 1) == used - 1;
    if (last) *finished = 0;
  }
  __syncthreads();
  if (!last) return;
  fence();

  // Combines the splits: a thread has four columns of a head at a time.
  constexpr int QUADS = GROUP * VALUE_DIM / 4;
  for (int quad = thread; quad < (QUADS + THREADS - 1) / THREADS * THREADS; quad += THREADS) {
    bool exists = quad < QUADS;
    int g = exists ? 4 * quad / VALUE_DIM : 0, column = 4 * quad % VALUE_DIM;
    float largest = MASKED, sum = 0, y[4] = {};
    if (SINKS) largest = token.sinks[head * GROUP + g] * LOG2_E;
    for (int i = 0; i < used && exists; i++) {
      long at = (((long)i * sequences + sequence) * heads + head) * GROUP + g;
      float m = fresh(splits.most + at);
      largest = m > largest ? m : largest;
    }
    if (SINKS) sum = exp2f(token.sinks[head * GROUP + g] * LOG2_E - largest);
    for (int i = 0; i < used && exists; i++) {
      long at = (((long)i * sequences + sequence) * heads + head) * GROUP + g;
      float weight = exp2f(fresh(splits.most + at) - largest);
      sum += weight * fresh(splits.total + at);
      for (int j = 0; j < 4; j++) y[j] += weight * fresh(splits.sums + at * VALUE_DIM + column + j);
    }
    for (int j = 0; j < 4; j++) y[j] /= sum < 1e-30f ? 1e-30f : sum;
    out.store_quad(y, sequence, (head * GROUP + g) * VALUE_DIM + column, sequences,
                   heads * GROUP * VALUE_DIM, exists);
  }
}
