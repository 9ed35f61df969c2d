// Rows of activations in 8 bits, times quantized matrices, on tensor cores.
//
// A warp has TILES tiles of 16 rows of a matrix. Four threads in a row, a quad, have the same rows:
// each loads a unit (cuda_planes.cuh), whose words the others read from shared memory, since an
// operand of `mma` has weights of one unit in all four. The sum of a block of 32 weights, or of half
// of one where 16 weights share a scale, is an integer; sums of blocks are float32.
//
// ROWS of activations; PARTS of the inner dimension, each with a result of its own; WARPS of a
// block, SCRATCH bytes of shared memory. RMS_PARTS, RMS_SIZE and RMS_EPSILON describe a deferred
// normalization; 0 parts: there is none.

constexpr int COLUMN_TILES = (ROWS + 7) / 8;

// Integers are added to the bits of this number, 1.5 * 2^23, whose last mantissa bit counts 1: so
// that they are read as a float without a conversion.
constexpr int MAGIC_BITS = 0x4b400000;
constexpr float MAGIC = 12582912;

struct Activations {
  const u32* codes;        // [COLUMNS / 32, ROWS, 4, 2]
  const float* scale;      // [COLUMNS / 32, ROWS]
  const float* sums;       // [COLUMNS / 32, ROWS]
  const float* half_sums;  // [COLUMNS / 16, ROWS]
  const float* squares;    // [ROWS, RMS_PARTS]; null: the rows are final
};

template <class T>
struct alignas(2 * sizeof(T)) Two {
  T at[2];
};

__shared__ Words scratch[SCRATCH / 16];

// Of the two rows of activations that a thread has results of; rows past the last one repeat it.
__device__ inline Two<float> of_results(const float* x, int tile) {
  int row = 8 * tile + threadIdx.x % 4 * 2;
  if (ROWS % 2 == 0) return *(const Two<float>*)(x + (row < ROWS ? row : ROWS - 2));
  return {x[row < ROWS ? row : ROWS - 1], x[row + 1 < ROWS ? row + 1 : ROWS - 1]};
}

// A tile's results of 8 rows of activations, from the thread's four sums.
template <class T>
__device__ inline void store_tile(const float* sums, int columns, int first, int out, T* y) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int row = 8 * columns + threadIdx.x % 4 * 2 + i % 2;
    int at = first + threadIdx.x % 32 / 4 + i / 2 * 8;
    if (row < ROWS && at < out) {
      store(y + (long)row * out + at, RMS_PARTS ? sums[i] * factors[row] : sums[i]);
    }
  }
}

// Units of eight rows, four of each, in shared memory: pieces of 16 bytes of the first plane, one
// with the words of the second plane, then scales and minima.
template <class W>
struct Staged {
  typedef Unit<W> U;
  static constexpr int PIECES = U::BYTES / 16;
  static_assert(U::SECOND_WORDS <= 4, "words of the second plane fit into a piece");

  Words codes_[PIECES + (U::SECOND ? 1 : 0)][8][4];
  float groups[U::SEGMENTS * (U::BELOW ? 2 : 1)][8][4];

  // Where units of a row are, so that neither stores nor loads of a warp conflict in banks.
  __device__ static int slot(int quad, int unit) { return unit ^ (quad / 2 & 3); }

  __device__ void store(const U& unit, int quad, int member) {
#pragma unroll
    for (int i = 0; i < PIECES + (U::SECOND ? 1 : 0); i++) {
      Words words;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        words.at[k] = i < PIECES ? unit.first[4 * i + k] : k < U::SECOND_WORDS ? unit.second[k] : 0;
      }
      codes_[i][quad][slot(quad, member)] = words;
    }
    float outer = U::outer_of(unit.super_scale);
    float below = U::outer_below_of(unit.super_scale, unit.super_minimum);
#pragma unroll
    for (int i = 0; i < U::SEGMENTS; i++) {
      groups[i][quad][member] = W::scale_value(unit.scale[i]) * outer;
      if (U::BELOW) {
        float minimum = U::minimum_of(unit.scale[i], unit.minimum[i]);
        groups[U::SEGMENTS + i][quad][member] = minimum * below;
      }
    }
  }

  __device__ float scale(int quad, int unit, int segment) const {
    return groups[segment][quad][unit];
  }

  __device__ float minimum(int quad, int unit, int segment) const {
    return groups[U::SEGMENTS + segment][quad][unit];
  }

  // Four codes: those of word `k` of a slice.
  __device__ u32 codes(int quad, int unit, int slice, int k, int place) const {
    int at = slot(quad, unit), word = U::first_word(slice, k);
    u32 first = codes_[word / 4][quad][at].at[word % 4];
    u32 second = U::SECOND ? codes_[PIECES][quad][at].at[U::second_word(slice, k)] : 0;
    return U::codes_of(first, second, slice, k, place);
  }
};

// WARPS / SHARE * TILES tiles of a matrix: SHARE warps, each with some of the units, share a tile.
template <class W, int TILES, int SHARE, class T>
__device__ void multiply(const W& w, const Activations& x, int program, int part, T* y) {
  typedef Unit<W> U;
  constexpr int ROUNDS = (U::IN_ROW + 3) / 4, OF_PART = (ROUNDS + PARTS - 1) / PARTS;
  // A pass multiplies a slice of each unit; two, where units have whole blocks.
  constexpr int SPAN = U::WHOLE ? 2 : 1, PASSES = U::SLICES / SPAN, BLOCKS = 2 * SPAN;
  constexpr bool HALVES = W::GROUP == 16;
  static_assert(HALVES || W::GROUP % 32 == 0, "a group is half a block, or some blocks");
  static_assert(WARPS * 2 * TILES * sizeof(Staged<W>) <= SCRATCH, "all units fit");
  int lane = threadIdx.x % 32, warp = warp_index(), quad = lane / 4, member = lane % 4;
  int first = (program * (WARPS / SHARE) + warp / SHARE) * TILES * 16;
  int stop = (part + 1) * OF_PART < ROUNDS ? (part + 1) * OF_PART : ROUNDS;

  // The thread's units of a round: of rows 8 apart.
  U units[2 * TILES];
  auto load = [&](int round) {
    int unit = 4 * round + member;
    unit = U::IN_ROW % 4 == 0 || unit < U::IN_ROW ? unit : U::IN_ROW - 1;
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) {
      int row = first + i * 8 + quad < W::OUT ? first + i * 8 + quad : W::OUT - 1;
      units[i].load_codes(w, row, unit / U::PER_CHUNK, unit % U::PER_CHUNK);
    }
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) {
      int row = first + i * 8 + quad < W::OUT ? first + i * 8 + quad : W::OUT - 1;
      units[i].load_scales(w, row, unit / U::PER_CHUNK, unit % U::PER_CHUNK);
    }
  };

  float total[TILES][COLUMN_TILES][4] = {};
  Staged<W>* staged = (Staged<W>*)scratch + warp * 2 * TILES;
  int round = part * OF_PART + warp % SHARE;
  if (round < stop) load(round);
#pragma unroll 1
  for (; round < stop; round += SHARE) {
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) staged[i].store(units[i], quad, member);
    wait_for_warp();
    if (round + SHARE < stop) load(round + SHARE);
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
#pragma unroll
      for (int q = 0; q < BLOCKS; q++) {
        // The unit and the slice of both halves of a block.
        int unit[2] = {U::WHOLE ? q : 2 * q, U::WHOLE ? q : 2 * q + 1};
        int slice[2] = {pass * SPAN, pass * SPAN + SPAN - 1};
        int at[2] = {4 * round + unit[0], 4 * round + unit[1]};
        if (U::IN_ROW % 4 && at[0] >= U::IN_ROW) continue;
        int block = U::first_weight(at[0] / U::PER_CHUNK, at[0] % U::PER_CHUNK, slice[0]) / 32;
        u32 a[TILES][4];
        float scale[TILES][2][2], minimum[TILES][2][2];
#pragma unroll
        for (int i = 0; i < 4 * TILES; i++) {
          int tile = i / 4, low = i % 2, half = i / 2 % 2, segment = slice[half] / U::SEGMENT;
          const Staged<W>& from = staged[2 * tile + low];
          a[tile][i % 4] = from.codes(quad, unit[half], slice[half], member, at[half] % U::PER_CHUNK);
          if (half && !HALVES) continue;
          scale[tile][low][half] = from.scale(quad, unit[half], segment);
          if (U::BELOW) minimum[tile][low][half] = from.minimum(quad, unit[half], segment);
        }
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
          int row = 8 * n + quad < ROWS ? 8 * n + quad : ROWS - 1;
          Two<u32> b = *(const Two<u32>*)(x.codes + 8 * (block * ROWS + row) + 2 * member);
          Two<float> x_scale = of_results(x.scale + block * ROWS, n), sums[2];
          if (U::BELOW && !HALVES) sums[0] = of_results(x.sums + block * ROWS, n);
          if (U::BELOW && HALVES) {
            sums[0] = of_results(x.half_sums + 2 * block * ROWS, n);
            sums[1] = of_results(x.half_sums + (2 * block + 1) * ROWS, n);
          }
#pragma unroll
          for (int tile = 0; tile < TILES; tile++) {
            int products[2][4];
            if (HALVES) {
              multiply_16(products[0], a[tile], b.at[0], MAGIC_BITS);
              multiply_16(products[1], a[tile] + 2, b.at[1], MAGIC_BITS);
            } else {
              multiply_32(products[0], a[tile], b.at, MAGIC_BITS);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
              const float *s = scale[tile][i / 2], *m = minimum[tile][i / 2];
              float& sum = total[tile][n][i];
              float product = bits_float(products[0][i]) - MAGIC;
              if (HALVES) {
                product = product * s[0] + (bits_float(products[1][i]) - MAGIC) * s[1];
                sum += product * x_scale.at[i % 2];
              } else {
                sum += product * (s[0] * x_scale.at[i % 2]);
              }
              if (U::BELOW) sum += m[0] * sums[0].at[i % 2];
              if (U::BELOW && HALVES) sum += m[1] * sums[1].at[i % 2];
            }
          }
        }
      }
    }
    wait_for_warp();
  }

  find_factors(x.squares, [](int i) { return i; });
  y += (long)part * ROWS * W::OUT;
  float* sums_of_warps = (float*)scratch;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    int tile_first = first + 16 * tile;
    if (SHARE == 1) {
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; n++) store_tile(total[tile][n], n, tile_first, W::OUT, y);
      continue;
    }
    // Sums over the warps, each of which has some of the results.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4 * COLUMN_TILES; i++) {
      sums_of_warps[(warp * 4 * COLUMN_TILES + i) * 32 + lane] = total[tile][i / 4][i % 4];
    }
    __syncthreads();
    for (int n = warp % SHARE; n < COLUMN_TILES; n += SHARE) {
      float sums[4] = {};
      for (int other = warp / SHARE * SHARE; other < warp / SHARE * SHARE + SHARE; other++) {
        for (int i = 0; i < 4; i++) {
          sums[i] += sums_of_warps[((other * COLUMN_TILES + n) * 4 + i) * 32 + lane];
        }
      }
      store_tile(sums, n, tile_first, W::OUT, y);
    }
  }
}
