// Rows of activations in 16 bits, times quantized matrices, on tensor cores.
//
// A warp has 16 rows of a matrix, a block of threads 16 for each of its WARPS, and TILE rows of the
// ROWS of activations, which make some of the RESULTS. A round is 64 bytes of each row of the matrix,
// in four pieces of 16, and the tiles of activations that they are multiplied with: 64 columns each.
// Rounds are copied to shared memory ahead of time, to one of STAGES places. A thread dequantizes
// words of its quad's row and of the row eight below, four neighbors at a time, and never stores them.
//
// PARTS of the inner dimension have results of their own. RMS_PARTS, RMS_SIZE and RMS_EPSILON
// describe a deferred normalization; 0 parts: there is none. With WARPGROUPS, four warps multiply
// together.

constexpr int TILE_BYTES = 128 * TILE;

struct Activations {
  const X* values;       // [COLUMNS / 64, ROWS, 64], see SwizzledRows
  const float* squares;  // [ROWS, RMS_PARTS]; null: the rows are final
};

// The rows of a block: which activations it multiplies with which matrix, and where results go.
struct Neighbors {
  int first = blockIdx.z * TILE;

  __device__ int matrix() const { return 0; }
  __device__ int source(int i) const { return first + i < ROWS ? first + i : ROWS - 1; }
  __device__ int result(int i) const { return first + i; }
  __device__ int stop() const { return ROWS; }
};

// Those of a group: see `GroupedGemmInfo`.
struct Group {
  const int *matrices, *starts, *stops;  // [groups]
  const int* sources;                    // [groups, GROUP]
  const int* count;
  int group = blockIdx.z / (GROUP / TILE), first = blockIdx.z % (GROUP / TILE) * TILE;

  __device__ bool exists() const { return group < *count && result(0) < stop(); }
  __device__ int matrix() const { return matrices[group]; }
  __device__ int source(int i) const { return sources[group * GROUP + first + i]; }
  __device__ int result(int i) const { return starts[group] + first + i; }
  __device__ int stop() const { return stops[group]; }
};

// A round of a matrix.
template <class W>
struct Round {
  typedef Unit<W> U;
  static constexpr int TILES = U::PER_BYTE;
  static constexpr int COUNT = W::COLUMNS / (64 * TILES);
  // Rounds of a chunk, or chunks of a round.
  static constexpr int OF_CHUNK = U::CHUNK_BYTES > 64 ? U::CHUNK_BYTES / 64 : 1;
  static constexpr int CHUNKS = U::CHUNK_BYTES < 64 ? 64 / U::CHUNK_BYTES : 1;
  static constexpr int SECOND = CHUNKS * U::SECOND;  // bytes of a row in the second plane
  static constexpr int PIECES = 4 + SECOND / 16;
  static constexpr int SPAN = W::GROUP < 64 ? W::GROUP : 64;  // weights of a tile that share a scale
  static constexpr int SPANS = 64 / SPAN;                     // of a tile
  // Of a piece of all rows: padded, so that copies of four pieces reach all banks.
  static constexpr int PIECE_BYTES = 16 * 16 + 32;
  static constexpr int CODE_BYTES = WARPS * PIECES * PIECE_BYTES;
  static constexpr int STAGE_BYTES = (TILES * TILE_BYTES + CODE_BYTES + 1023) / 1024 * 1024;
  static_assert(SECOND % 16 == 0, "whole pieces");

  // The first weight of a tile.
  __device__ static int weight(int round, int tile) {
    if (OF_CHUNK == 1) return (round * TILES + tile) * 64;
    return round / OF_CHUNK * W::CHUNK + tile * U::CHUNK_BYTES + round % OF_CHUNK * 64;
  }

  // Of the weights that a piece holds at some bits: the slice of the round, tile by tile.
  __device__ static int slice(int piece, int i) {
    if (OF_CHUNK > 1) return 4 * i + piece;
    return (chunk(piece) * W::CHUNK + i * U::CHUNK_BYTES + 16 * piece % U::CHUNK_BYTES) / 16;
  }

  // The chunk of a round.
  __device__ static int chunk(int piece) { return CHUNKS > 1 ? 16 * piece / U::CHUNK_BYTES : 0; }

  // The slice of a unit, and its place in the chunk, as `Unit` counts them.
  __device__ static int unit_slice(int piece, int i) {
    return U::WHOLE ? i * (U::BYTES / 16) + piece % (U::BYTES / 16) : i;
  }

  // The word of a row in the second plane that goes with four neighbors: its byte in the round.
  __device__ static int second_byte(int piece, int of_unit, int member, int place) {
    int at = U::WHOLE ? 4 * U::second_word(of_unit, member)
                      : U::byte_of(of_unit, member, place) % (U::SECOND ? U::SECOND : 1);
    return chunk(piece) * U::SECOND + at;
  }

  __device__ static int place(int round, int piece) {
    return U::WHOLE ? 0 : (round % OF_CHUNK * 4 + piece) % U::PER_CHUNK;
  }
};

// Scales and minima of a round, as float32: of 16 rows, span by span.
template <class W>
struct Scales {
  typedef Round<W> R;
  typedef typename R::U U;
  static constexpr int SPANS = R::TILES * R::SPANS;
  static constexpr int OF_THREAD = (SPANS + 1) / 2;

  // The thread's own: of one row, and every other span.
  u32 scale[OF_THREAD], minimum[OF_THREAD], super_scale[OF_THREAD], super_minimum[OF_THREAD];

  __device__ void load(const W& w, long row, int round) {
#pragma unroll
    for (int i = 0; i < OF_THREAD; i++) {
      int span = 2 * i + threadIdx.x / 16 % 2;
      span = span < SPANS ? span : SPANS - 1;
      int weight = R::weight(round, span / R::SPANS) + span % R::SPANS * R::SPAN;
      long at = row * (W::COLUMNS / W::GROUP) + weight / W::GROUP;
      scale[i] = load_group<W>(w.scale, at);
      if (W::MINIMUM) minimum[i] = load_group<W>(w.minimum, at);
      if (W::SUPER) {
        constexpr int SUPER = W::SUPER ? W::SUPER : 1;
        at = row * (W::COLUMNS / SUPER) + weight / SUPER;
        super_scale[i] = load_raw(w.super_scale + at);
        if (W::MINIMUM) super_minimum[i] = load_raw(w.super_minimum + at);
      }
    }
  }

  __device__ void store(float (*scales)[16], float (*minima)[16]) const {
#pragma unroll
    for (int i = 0; i < OF_THREAD; i++) {
      int span = 2 * i + threadIdx.x / 16 % 2;
      if (span >= SPANS) continue;
      int row = threadIdx.x % 16;
      scales[span][row] = W::scale_value(scale[i]) * U::outer_of(super_scale[i]);
      if (!U::BELOW) continue;
      float below = U::outer_below_of(super_scale[i], super_minimum[i]);
      minima[span][row] = U::minimum_of(scale[i], minimum[i]) * below;
    }
  }
};

// Four weights, rounded to 16 bits: in words of two. Codes are signed where a table or a trellis made
// them, else as they are stored.
template <class W>
__device__ inline void dequantize(u32 codes, float scale, float minimum, u32* y, int distance) {
  // Bytes become the lowest bits of 2^23, the rest of whose mantissa counts units.
  constexpr bool SIGNED = W::TABLE || W::TRELLIS || W::BITS0 == 8;
  constexpr float START = 8388608 + (SIGNED ? 128 : W::OFFSET);
  if (SIGNED) codes ^= 0x80808080u;
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float value = bits_float(pick_bytes(codes, 0x4b000000, 0x7440 | i)) - START;
    values[i] = Unit<W>::BELOW ? value * scale + minimum : value * scale;
  }
  y[0] = pack<X>(values[0], values[1]);
  y[distance] = pack<X>(values[2], values[3]);
}

// Adds the products of the warp's 16 x 16 weights with 16 columns of a tile.
__device__ inline void multiply_tile(float* sums, const u32* a, const char* tile, int slice) {
#ifdef WARPGROUPS
  multiply_add_columns<X, TILE>(sums, a, columns_at(tile + 32 * slice));
#else
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < TILE / 8; n += 2) {
    u32 b[4];
    int row = 8 * n + lane / 16 * 8 + lane % 8;
    row = TILE % 16 == 0 || row < TILE ? row : row - 8;
    load_matrices(b, tile + 128 * row + ((2 * slice + lane / 8 % 2) ^ (lane % 8)) * 16);
    multiply_add<X>(sums + 4 * n, a, b);
    if (n + 1 < TILE / 8) multiply_add<X>(sums + 4 * n + 4, a, b + 2);
  }
#endif
}

// Copies COUNT pieces of 16 bytes of a plane, of each of the warp's rows: `first` of OUT of a
// matrix.
template <class W, int COUNT>
__device__ inline void copy_rows(char* to, const u32* plane, int matrix, int first, int row_bytes,
                                 int offset) {
#pragma unroll
  for (int i = 0; i < (COUNT + 1) / 2; i++) {
    int at = 32 * i + threadIdx.x % 32, row = at / COUNT, piece = at % COUNT;
    if (16 * COUNT % 32 && row >= 16) continue;
    long existing = (long)matrix * W::OUT + (first + row < W::OUT ? first + row : W::OUT - 1);
    start_copy(to + piece * Round<W>::PIECE_BYTES + 16 * row,
               (const char*)plane + existing * row_bytes + offset + 16 * piece);
  }
}

template <class W, int STAGES, class Rows, class Y>
__device__ void multiply(const W& w, const Activations& x, const Rows& rows, int program, int part,
                         Y* y) {
  typedef Round<W> R;
  typedef Scales<W> S;
  typedef typename R::U U;
  constexpr int OF_PART = (R::COUNT + PARTS - 1) / PARTS, THREADS = 32 * WARPS;
  constexpr int OF_WARP = S::SPANS * (U::BELOW ? 2 : 1);
  static_assert(STAGES * R::STAGE_BYTES + WARPS * OF_WARP * 64 <= SHARED, "all of it fits");
  int warp = warp_index(), lane = threadIdx.x % 32, quad = lane / 4, member = lane % 4;
  int first = (program * WARPS + warp) * 16, matrix = rows.matrix();
  int begin = part * OF_PART, stop = begin + OF_PART < R::COUNT ? begin + OF_PART : R::COUNT;
  float(*scales)[16] = (float(*)[16])(dynamic_shared + STAGES * R::STAGE_BYTES) + warp * OF_WARP;
  float(*minima)[16] = scales + S::SPANS;

  // The thread's pieces of a tile: where they are in a block of 64 columns, in pieces.
  constexpr int OF_THREAD = (8 * TILE + THREADS - 1) / THREADS;
  int source[OF_THREAD];
#pragma unroll
  for (int i = 0; i < OF_THREAD; i++) {
    int at = i * THREADS + threadIdx.x, row = rows.source(at / 8 < TILE ? at / 8 : TILE - 1);
    source[i] = 8 * row + (at % 8 ^ at / 8 % 8 ^ row % 8);
  }

  // A group of copies: of a round, if there is one.
  auto fetch = [&](int round) {
    if (round < stop) {
      char* stage = dynamic_shared + (round - begin) % STAGES * R::STAGE_BYTES;
#pragma unroll
      for (int tile = 0; tile < R::TILES; tile++) {
        const char* from = (const char*)x.values + 128l * ROWS * (R::weight(round, tile) / 64);
#pragma unroll
        for (int i = 0; i < OF_THREAD; i++) {
          int at = i * THREADS + threadIdx.x;
          if (8 * TILE % THREADS && at >= 8 * TILE) continue;
          start_copy(stage + tile * TILE_BYTES + 16 * at, from + 16l * source[i]);
        }
      }
      char* codes = stage + R::TILES * TILE_BYTES + warp * R::PIECES * R::PIECE_BYTES;
      copy_rows<W, 4>(codes, w.first, matrix, first, W::COLUMNS / U::PER_BYTE, 64 * round);
      if (R::SECOND) {
        copy_rows<W, R::SECOND ? R::SECOND / 16 : 1>(codes + 4 * R::PIECE_BYTES, w.second, matrix,
                                                     first, W::COLUMNS / 8 * W::BITS1,
                                                     R::SECOND * (round / R::OF_CHUNK));
      }
    }
    end_group();
  };

  float total[TILE / 2] = {};
  u32 a[2][4];
  S own;
  int scaled = first + lane % 16 < W::OUT ? first + lane % 16 : W::OUT - 1;
  long scaled_row = (long)matrix * W::OUT + scaled;
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) fetch(begin + i);
  if (begin < stop) own.load(w, scaled_row, begin);
#pragma unroll 1
  for (int round = begin; round < stop; round++) {
    wait_for_groups<STAGES - 2>();
    __syncthreads();
    fetch(round + STAGES - 1);
    own.store(scales, minima);
    wait_for_warp();
    if (round + 1 < stop) own.load(w, scaled_row, round + 1);
    const char* tiles = dynamic_shared + (round - begin) % STAGES * R::STAGE_BYTES;
    const char* codes = tiles + R::TILES * TILE_BYTES + warp * R::PIECES * R::PIECE_BYTES;
#pragma unroll
    for (int piece = 0; piece < 4; piece++) {
      u32 words[2], second[2] = {};
      int place = R::place(round, piece);
#pragma unroll
      for (int i = 0; i < R::TILES; i++) {
        u32* operand = a[(piece * R::TILES + i) % 2];
        int of_unit = R::unit_slice(piece, i), slice = R::slice(piece, i);
        int span = slice * 16 / R::SPAN;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          int row = quad + 8 * half;
          const char* of_row = codes + 16 * row;
          if (i == 0 || W::TRELLIS) {
            int word = U::first_word(of_unit, member) % 4;
            words[half] = *(const u32*)(of_row + piece * R::PIECE_BYTES + 4 * word);
          }
          if (R::SECOND && (i == 0 || W::TRELLIS)) {
            int at = R::second_byte(piece, of_unit, member, place);
            second[half] = *(const u32*)(of_row + (4 + at / 16) * R::PIECE_BYTES + at % 16);
          }
          u32 four = W::TABLE || W::TRELLIS
                         ? U::codes_of(words[half], second[half], of_unit, member, place)
                         : U::stored_codes_of(words[half], second[half], of_unit, member, place);
          float minimum = U::BELOW ? minima[span][row] : 0;
          dequantize<W>(four, scales[span][row], minimum, operand + half, 2);
        }
        begin_products();
        multiply_tile(total, operand, tiles + slice / 4 * TILE_BYTES, slice % 4);
        end_products();
        wait_for_products<1>();
      }
    }
    wait_for_products<0>();
  }

  // Results of neighboring rows of the matrix are stored together.
  constexpr int SLAB = TILE < 32 ? TILE : 32, WIDTH = 16 * WARPS, STRIDE = WIDTH + 4;
  static_assert(4 * SLAB * STRIDE <= SHARED, "results fit");
  float* results = (float*)dynamic_shared;
  find_factors(x.squares);
#pragma unroll
  for (int slab = 0; slab < TILE; slab += SLAB) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < SLAB / 2; i++) {
      if (slab + i / 4 * 8 >= TILE) continue;
      int row = i / 4 * 8 + 2 * member + i % 2;
      results[row * STRIDE + 16 * warp + quad + i / 2 % 2 * 8] = total[slab / 2 + i];
    }
    __syncthreads();
    for (int at = threadIdx.x; at < SLAB * WIDTH; at += THREADS) {
      int i = slab + at / WIDTH, of_matrix = program * WIDTH + at % WIDTH;
      if (i >= TILE || rows.result(i) >= rows.stop() || of_matrix >= W::OUT) continue;
      float value = results[at / WIDTH * STRIDE + at % WIDTH];
      if (RMS_PARTS) value *= factors[rows.source(i)];
      store(y + ((long)part * RESULTS + rows.result(i)) * W::OUT + of_matrix, value);
    }
  }
}
