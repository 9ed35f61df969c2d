// Rows of activations in 8 bits, times quantized matrices, on tensor cores.
//
// A warp has TILES tiles of 16 rows of a matrix. A quad, four threads in a row, shares rows: each
// thread loads and unpacks a unit (cuda_planes.cuh), and the quad exchanges words of codes, so that
// each thread has its operands of the four units' blocks. The sum of a block of 32 weights, or of
// half of one where 16 weights share a scale, is an integer; sums of blocks are float32.
//
// ROWS of activations; PARTS of the inner dimension, each with a result of its own; WARPS of a
// block. RMS_PARTS, RMS_SIZE and RMS_EPSILON describe a deferred normalization; 0 parts: there is
// none.

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

__shared__ float sums_of_warps[SHARES ? WARPS * COLUMN_TILES * 128 : 1];
__shared__ float factors[RMS_PARTS ? ROWS : 1];

// Of the two rows of activations that a thread has results of; rows past the last one repeat it.
__device__ inline Two<float> of_results(const float* x, int tile) {
  int row = 8 * tile + threadIdx.x % 4 * 2;
  if (ROWS % 2 == 0) return *(const Two<float>*)(x + (row < ROWS ? row : ROWS - 2));
  return {x[row < ROWS ? row : ROWS - 1], x[row + 1 < ROWS ? row + 1 : ROWS - 1]};
}

// Word i of thread j of a quad goes to word j of thread i.
__device__ inline void transpose(u32* words) {
  bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    u32 other = exchange(odd ? words[i] : words[i + 1], 1);
    words[i] = odd ? other : words[i];
    words[i + 1] = odd ? words[i + 1] : other;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    u32 other = exchange(high ? words[i] : words[i + 2], 2);
    words[i] = high ? other : words[i];
    words[i + 2] = high ? words[i + 2] : other;
  }
}

// The deferred normalization: what results of each row are multiplied with.
__device__ inline void find_factors(const Activations& x) {
  if (!RMS_PARTS) return;
  for (int row = threadIdx.x; row < ROWS; row += 32 * WARPS) {
    float squares = 0;
    for (int i = 0; i < RMS_PARTS; i++) squares += x.squares[row * RMS_PARTS + i];
    factors[row] = inverse_root(squares / RMS_SIZE + RMS_EPSILON);
  }
  __syncthreads();
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

// Scale and minimum of each segment of a unit.
template <class W>
struct Scales {
  float scale[Unit<W>::SEGMENTS], minimum[W::MINIMUM ? Unit<W>::SEGMENTS : 1];

  __device__ void convert(const Unit<W>& unit) {
    float outer = W::SUPER ? half_to_float(unit.super_scale) : 1;
    float below = W::SUPER && W::MINIMUM ? half_to_float(unit.super_minimum) : 1;
#pragma unroll
    for (int i = 0; i < Unit<W>::SEGMENTS; i++) {
      scale[i] = (float)Raw<typename W::Scale>::value(unit.scale[i]) * outer;
      if (W::MINIMUM) minimum[i] = (float)Raw<typename W::Minimum>::value(unit.minimum[i]) * below;
    }
  }
};

// WARPS / SHARE * TILES tiles of a matrix: SHARE warps, each with some of the units, share a tile.
template <class W, int TILES, int SHARE, class T>
__device__ void multiply(const W& w, const Activations& x, int program, int part, T* y) {
  typedef Unit<W> U;
  constexpr int ROUNDS = (U::IN_ROW + 3) / 4, OF_PART = (ROUNDS + PARTS - 1) / PARTS;
  // A pass multiplies a slice of each unit; two, where units have whole blocks.
  constexpr int SPAN = U::WHOLE ? 2 : 1, PASSES = U::SLICES / SPAN, BLOCKS = 2 * SPAN;
  constexpr bool HALVES = W::GROUP % 32 != 0;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane / 4, member = lane % 4;
  int first = (program * (WARPS / SHARE) + warp / SHARE) * TILES * 16;
  int stop = (part + 1) * OF_PART < ROUNDS ? (part + 1) * OF_PART : ROUNDS;

  // Units of a round: four of each row.
  auto load = [&](U(&units)[TILES][2], int round) {
    int unit = 4 * round + member;
    unit = U::IN_ROW % 4 == 0 || unit < U::IN_ROW ? unit : U::IN_ROW - 1;
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) {
      int row = first + i * 8 + quad;
      row = row < W::OUT ? row : W::OUT - 1;
      units[i / 2][i % 2].load_codes(w, row, unit / U::PER_CHUNK, unit % U::PER_CHUNK);
      units[i / 2][i % 2].load_scales(w, row, unit / U::PER_CHUNK, unit % U::PER_CHUNK);
    }
  };

  float total[TILES][COLUMN_TILES][4] = {};
  U units[TILES][2];
  int round = part * OF_PART + warp % SHARE;
  if (round < stop) load(units, round);
#pragma unroll 1
  for (; round < stop; round += SHARE) {
    U next[TILES][2];
    if (round + SHARE < stop) load(next, round + SHARE);
    Scales<W> scales[TILES][2];
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) scales[i / 2][i % 2].convert(units[i / 2][i % 2]);
    int place = (4 * round + member) % U::PER_CHUNK;
#pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
      u32 codes[TILES][2][SPAN][4];
#pragma unroll
      for (int i = 0; i < 2 * TILES * SPAN; i++) {
        u32* words = codes[i / 2 / SPAN][i / SPAN % 2][i % SPAN];
#pragma unroll
        for (int k = 0; k < 4; k++) {
          words[k] = units[i / 2 / SPAN][i / SPAN % 2].codes(pass * SPAN + i % SPAN, k, place);
        }
        transpose(words);
      }
#pragma unroll
      for (int q = 0; q < BLOCKS; q++) {
        // The units and slices of both halves.
        int unit[2] = {U::WHOLE ? q : 2 * q, U::WHOLE ? q : 2 * q + 1};
        int slice[2] = {0, SPAN - 1};
        float scale[TILES][2][2], minimum[TILES][2][2];
#pragma unroll
        for (int i = 0; i < 4 * TILES; i++) {
          int tile = i / 4, low = i / 2 % 2, half = i % 2;
          if (half && !HALVES) continue;
          int segment = (pass * SPAN + slice[half]) / U::SEGMENT;
          const Scales<W>& own = scales[tile][low];
          scale[tile][low][half] = from_member(own.scale[segment], unit[half]);
          if (W::MINIMUM) minimum[tile][low][half] = from_member(own.minimum[segment], unit[half]);
        }
        int index = 4 * round + unit[0];
        if (U::IN_ROW % 4 && index >= U::IN_ROW) continue;
        int block = U::first_weight(index / U::PER_CHUNK, index % U::PER_CHUNK, pass * SPAN) / 32;
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; n++) {
          int row = 8 * n + quad < ROWS ? 8 * n + quad : ROWS - 1;
          Two<u32> b = *(const Two<u32>*)(x.codes + 8 * (block * ROWS + row) + 2 * member);
          Two<float> x_scale = of_results(x.scale + block * ROWS, n), sums[2];
          if (W::MINIMUM && !HALVES) sums[0] = of_results(x.sums + block * ROWS, n);
          if (W::MINIMUM && HALVES) {
            sums[0] = of_results(x.half_sums + 2 * block * ROWS, n);
            sums[1] = of_results(x.half_sums + (2 * block + 1) * ROWS, n);
          }
#pragma unroll
          for (int tile = 0; tile < TILES; tile++) {
            u32 a[4];
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = codes[tile][i % 2][slice[i / 2]][unit[i / 2]];
            int products[2][4];
            if (HALVES) {
              multiply_16(products[0], a, b.at[0], MAGIC_BITS);
              multiply_16(products[1], a + 2, b.at[1], MAGIC_BITS);
            } else {
              multiply_32(products[0], a, b.at, MAGIC_BITS);
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
              if (W::MINIMUM) sum += m[0] * sums[0].at[i % 2];
              if (W::MINIMUM && HALVES) sum += m[1] * sums[1].at[i % 2];
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * TILES; i++) units[i / 2][i % 2] = next[i / 2][i % 2];
  }

  find_factors(x);
  y += (long)part * ROWS * W::OUT;
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    if (SHARE == 1) {
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; n++) store_tile(total[tile][n], n, first + 16 * tile, W::OUT, y);
      continue;
    }
    // Sums over the warps: each has some of the results.
    if (tile) __syncthreads();
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
      store_tile(sums, n, first + 16 * tile, W::OUT, y);
    }
  }
}
