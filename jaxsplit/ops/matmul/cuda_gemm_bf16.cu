// Rows of activations in 16 bits, times quantized matrices, on tensor cores.
//
// A warp has 16 rows of a matrix, a block of threads 16 for each of its WARPS, and TILE rows of the
// ROWS of activations, which make some of the RESULTS. A round is 64 bytes of each row of the matrix,
// in four pieces of 16, and the tiles of activations that they are multiplied with: 64 columns each.
// Rounds are copied to shared memory ahead of time, to one of STAGES places: a warp copies its own
// rows of the matrix, and tiles are copied by all threads, or, with WARPGROUPS, in bulk where their
// rows are neighbors. A thread dequantizes words of its quad's row and of the row eight below, four
// neighbors at a time, and never stores them.
//
// BATCH slices of 16 columns are multiplied at a time.
//
// PARTS of the inner dimension have results of their own. RMS_PARTS, RMS_SIZE and RMS_EPSILON
// describe a deferred normalization; 0 parts: there is none. With WARPGROUPS, four warps multiply
// together.

constexpr int TILE_BYTES = 128 * TILE;

#ifdef WARPGROUPS
constexpr bool HAS_WARPGROUPS = true;
#else
constexpr bool HAS_WARPGROUPS = false;
#endif

// Whether a type in 16 bits has the exponents of float32.
template <class T>
constexpr bool HAS_RANGE = false;
template <>
constexpr bool HAS_RANGE<Bfloat16> = true;

struct Activations {
  const X* values;       // [COLUMNS / 64, ROWS, 64], see SwizzledRows
  const float* squares;  // [ROWS, RMS_PARTS]; null: the rows are final
};

// The rows of a block: which activations it multiplies with which matrix, and where results go.
struct Neighbors {
  static constexpr bool ADJACENT = true;
  int first = blockIdx.z * TILE;

  __device__ int matrix() const { return 0; }
  __device__ int source(int i) const { return first + i < ROWS ? first + i : ROWS - 1; }
  __device__ int result(int i) const { return first + i; }
  __device__ int stop() const { return ROWS; }
};

// Those of a group: see `GroupedGemmInfo`.
struct Group {
  static constexpr bool ADJACENT = false;
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
  static constexpr int COUNT = (W::COLUMNS + 64 * TILES - 1) / (64 * TILES);
  // The last round has fewer tiles: those that it lacks are zeros.
  static constexpr bool PARTIAL = W::COLUMNS % (64 * TILES) != 0;
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
  static_assert(SECOND % 16 == 0 && !(PARTIAL && SECOND), "whole pieces");

  // The first weight of a tile.
  __device__ static u32 weight(u32 round, u32 tile) {
    u32 first = OF_CHUNK == 1 ? round * TILES * 64 : round / OF_CHUNK * W::CHUNK + round % OF_CHUNK * 64;
    return first + within(tile);
  }

  // The same, counted from the first weight of the round.
  __device__ static u32 within(u32 tile) { return tile * (OF_CHUNK == 1 ? 64 : U::CHUNK_BYTES); }

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

  __device__ static int place(u32 round, int piece) {
    return U::WHOLE ? 0 : (round % OF_CHUNK * 4 + piece) % U::PER_CHUNK;
  }
};

// A plane with BITS for each GROUP of weights: scales, minima, or those of super-groups. STEP bytes
// of a row are copied at a time, which are enough for some ROUNDS.
template <class W, class T, int GROUP, int BITS, int AHEAD>
struct GroupPlane {
  typedef Round<W> R;
  static constexpr u32 ROW_BYTES = W::COLUMNS / GROUP * BITS / 8;
  static constexpr u32 UNIT = ROW_BYTES % 16 == 0 ? 16 : ROW_BYTES % 8 == 0 ? 8 : 4;  // of a copy
  // Rows of an odd number of halfwords: those of a step, in the words that have them.
  static constexpr bool ODD = ROW_BYTES % 4 != 0;
  static constexpr u32 OF_ROUND = 64 * R::TILES * BITS / (8 * GROUP);
  static constexpr u32 LEAST = ODD ? 2 : UNIT, STEP = OF_ROUND > LEAST ? OF_ROUND : LEAST;
  static constexpr u32 COPIES = !ODD ? STEP / UNIT : STEP == 2 ? 1 : STEP / 4 + 1;
  static constexpr u32 BYTES = COPIES * UNIT;
  static constexpr u32 ROUNDS = 8 * STEP / BITS * GROUP / (64 * R::TILES);
  // Windows of STEP bytes have so many places: as many as rounds under way need.
  static constexpr u32 PLACES = (AHEAD + ROUNDS - 1) / ROUNDS + 1, PLACE_BYTES = 16 * BYTES;
  static constexpr int ALL_BYTES = PLACES * PLACE_BYTES;
  static_assert(ROUNDS > 0 && STEP % LEAST == 0 && ROW_BYTES % 2 == 0, "whole rounds and copies");
  static_assert(BITS != 4 || GROUP <= 32, "rounds begin at whole bytes");

  // What `round` needs of one of 16 rows, unless the round before needed it.
  __device__ static void copy(char* places, const T* plane, long row, u32 round, bool is_first) {
    if (!is_first && round % ROUNDS) return;
    u32 window = round / ROUNDS;
    long from = row * ROW_BYTES + STEP * window, first = ODD ? from & ~3l : from;
    char* to = places + window % PLACES * PLACE_BYTES + threadIdx.x % 16 * BYTES;
#pragma unroll
    for (u32 i = 0; i < COPIES; i++) {
      if (i && first + UNIT * i >= (row + 1) * ROW_BYTES) continue;
      start_copy<UNIT>(to + UNIT * i, (const char*)plane + first + UNIT * i);
    }
  }

  // The stored number of a weight's group: of a row of the plane, one of the warp's 16. `within`:
  // the weight, counted from the first of the round, whose place is the same for all threads.
  __device__ static u32 load(const char* places, int of_warp, long row, u32 round, u32 within) {
    u32 byte = R::weight(round, 0) / GROUP * BITS / 8, window = byte / STEP;
    u32 bit = within / GROUP * BITS;
    const char* from = places + (window % PLACES * PLACE_BYTES + byte % STEP);
    from += of_warp * BYTES + bit / 8 + (ODD ? (row * ROW_BYTES + STEP * window) % 4 : 0);
    if (BITS == 4) return *(const u8*)from >> bit % 8 & 15;
    return BITS == 8 ? *(const u8*)from : BITS == 16 ? *(const u16*)from : *(const u32*)from;
  }
};

// How codes become weights. In the last bits of a bfloat16, a code is itself times 2^-133, exactly:
// those of 8 bits, too. Scales are multiplied with SCALE, so that neither they nor weights leave the
// range, and sums with RESULT. Half has no range for that; nor can offsets be part of
// minima that they would round: there, codes become numbers first.
template <class W>
struct Codes {
  static constexpr bool SIGNED = Unit<W>::SIGNED;
  static constexpr int OFFSET = SIGNED ? 128 : W::OFFSET;
  static constexpr bool ROUNDED = (OFFSET & (OFFSET - 1)) != 0 || (Unit<W>::BELOW && OFFSET);
  static constexpr bool SUBNORMAL = HAS_RANGE<X> && !ROUNDED;
  static constexpr float SCALE = SUBNORMAL ? 0x1p100f : 1;
  static constexpr float RESULT = SUBNORMAL ? 0x1p33f : 1;
};

// Scales and minima of a warp's 16 rows.
template <class W, int AHEAD>
struct Scales {
  typedef Round<W> R;
  typedef typename R::U U;
  static constexpr int BITS = W::SCALE_BITS == 4 ? 4 : 8 * sizeof(typename W::Scale);
  static constexpr int MINIMUM_BITS = W::SCALE_BITS == 4 ? 4 : 8 * sizeof(typename W::Minimum);
  static constexpr int SUPER = W::SUPER ? W::SUPER : W::COLUMNS;
  typedef GroupPlane<W, typename W::Scale, W::GROUP, BITS, AHEAD> Scale;
  typedef GroupPlane<W, typename W::Minimum, W::GROUP, MINIMUM_BITS, AHEAD> Minimum;
  typedef GroupPlane<W, typename W::Super, SUPER, 8 * sizeof(typename W::Super), AHEAD> Super;

  // Where planes are in shared memory.
  static constexpr int MINIMA = Scale::ALL_BYTES;
  static constexpr int SUPER_SCALES = MINIMA + (W::MINIMUM ? Minimum::ALL_BYTES : 0);
  static constexpr int SUPER_MINIMA = SUPER_SCALES + (W::SUPER ? Super::ALL_BYTES : 0);
  static constexpr int BYTES = SUPER_MINIMA + (W::SUPER && W::MINIMUM ? Super::ALL_BYTES : 0);

  // Half of the threads copy scales of their row, half of them minima.
  __device__ static void copy(char* places, const W& w, long row, u32 round, bool is_first) {
    bool of_scales = threadIdx.x % 32 < 16;
    if (of_scales) Scale::copy(places, w.scale, row, round, is_first);
    if (W::MINIMUM && !of_scales) Minimum::copy(places + MINIMA, w.minimum, row, round, is_first);
    if (!W::SUPER) return;
    if (of_scales) Super::copy(places + SUPER_SCALES, w.super_scale, row, round, is_first);
    if (W::MINIMUM && !of_scales) {
      Super::copy(places + SUPER_MINIMA, w.super_minimum, row, round, is_first);
    }
  }

  // Those of a weight, which is `within` the round: in 16 bits, the minimum in the upper half. See
  // `Codes`.
  __device__ static u32 load(const char* places, int of_warp, long row, u32 round, u32 within) {
    typedef Codes<W> C;
    if (R::PARTIAL && R::weight(round, 0) + within >= W::COLUMNS) return 0;
    u32 raw = Scale::load(places, of_warp, row, round, within), outer = 0;
    if (W::SUPER) outer = Super::load(places + SUPER_SCALES, of_warp, row, round, within);
    float above = W::scale_value(raw) * U::outer_of(outer) * C::SCALE, below = 0;
    if (U::BELOW) {
      u32 minimum = W::MINIMUM ? Minimum::load(places + MINIMA, of_warp, row, round, within) : 0;
      u32 outer_minimum = 0;
      if (W::SUPER && W::MINIMUM) {
        outer_minimum = Super::load(places + SUPER_MINIMA, of_warp, row, round, within);
      }
      below = U::minimum_of(raw, minimum) * U::outer_below_of(outer, outer_minimum) / C::RESULT;
    } else if (C::SUBNORMAL && C::OFFSET) {
      below = bits_float(pack<X>(above, 0) << 16) / C::SCALE * (-C::OFFSET / C::RESULT);  // exact
    }
    return pack<X>(above, below);
  }

  // Those of a row's spans in a round: a thread of a quad computes every fourth.
  __device__ static void load_round(u32* y, const char* places, int of_warp, long row, u32 round) {
    constexpr int SPANS = R::TILES * R::SPANS;
    int member = threadIdx.x % 4;
#pragma unroll
    for (int first = 0; first < SPANS; first += 4) {
      u32 span = first + member % SPANS;
      u32 within = R::within(span / R::SPANS) + span % R::SPANS * R::SPAN;
      u32 own = load(places, of_warp, row, round, within);
#pragma unroll
      for (int i = first; i < first + 4 && i < SPANS; i++) y[i] = from_quad(own, i % 4);
    }
  }
};

// Upper bytes of 128 as Bfloat16, and of 1024 as Half: codes in the lower bytes add to them, since
// the lowest bit of the mantissa counts units.
template <class T>
constexpr u32 UPPER_BYTE = 0x64;
template <>
constexpr u32 UPPER_BYTE<Bfloat16> = 0x43;

// Two neighbors of four codes, as numbers of 16 bits: exact.
template <bool SIGNED, int OFFSET>
__device__ inline u32 numbers(Bfloat16, u32 codes, u32 upper, u32 which) {
  constexpr u32 ONE = 0x3f803f80, MINUS_ONE = 0xbf80bf80, START = (0xc300 + OFFSET) * 0x10001u;
  if (!SIGNED) return multiply_add_pairs<Bfloat16>(pick_bytes(codes, upper, which), ONE, START);
  u32 above = pick_bytes(codes & 0x7f7f7f7fu, upper, which);
  u32 below = pick_bytes(codes & 0x80808080u, upper, which);  // 128 or 256
  return multiply_add_pairs<Bfloat16>(below, MINUS_ONE, above);
}

template <bool SIGNED, int OFFSET>
__device__ inline u32 numbers(Half, u32 codes, u32 upper, u32 which) {
  constexpr u32 ONE = 0x3c003c00, START = (0xe400 + (SIGNED ? 128 : OFFSET)) * 0x10001u;
  codes ^= SIGNED ? 0x80808080u : 0;
  return multiply_add_pairs<Half>(pick_bytes(codes, upper, which), ONE, START);
}

// Four weights, in words of two, given their group's scale and minimum.
template <class W>
__device__ inline void dequantize(u32 codes, u32 scales, u32 upper, u32* y, int distance) {
  typedef Codes<W> C;
  constexpr bool BELOW = Unit<W>::BELOW || (C::SUBNORMAL && C::OFFSET);
  if (C::SUBNORMAL && C::SIGNED) codes ^= 0x80808080u;
  u32 scale = both_lower(scales), minimum = both_upper(scales);
#pragma unroll
  for (int i = 0; i < 2; i++) {
    u32 which = i ? 0x4342 : 0x4140, pair = pick_bytes(codes, 0, which);
    if (!C::SUBNORMAL) pair = numbers<C::SIGNED, W::OFFSET>(X{}, codes, upper, which);
    y[i * distance] = multiply_add_pairs<X>(pair, scale, BELOW ? minimum : 0);
  }
}

// Adds the products of the warp's 16 x 16 weights with 16 columns of a round's tiles.
__device__ inline void multiply_tile(float* sums, const u32* a, const char* tiles, int slice) {
#ifdef WARPGROUPS
  int bytes = slice / 4 * TILE_BYTES + slice % 4 * 32;
  multiply_add_columns<X, TILE>(sums, a, columns_after(columns_at(tiles), bytes));
#else
  const char* tile = tiles + slice / 4 * TILE_BYTES;
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < TILE / 8; n += 2) {
    u32 b[4];
    int row = 8 * n + lane / 16 * 8 + lane % 8;
    row = TILE % 16 == 0 || row < TILE ? row : row - 8;
    int piece = (2 * (slice % 4) + lane / 8 % 2) ^ (lane % 8);
    load_matrices(b, shared_address(tile + 128 * row + 16 * piece));
    multiply_add<X>(sums + 4 * n, a, b);
    if (n + 1 < TILE / 8) multiply_add<X>(sums + 4 * n + 4, a, b + 2);
  }
#endif
}

// Copies of COUNT pieces of 16 bytes of a plane, of each of the warp's rows: `first` of OUT of a
// matrix.
template <class W, int COUNT>
struct Pieces {
  static constexpr int OF_THREAD = (16 * COUNT + 31) / 32;
  const char* from[OF_THREAD];

  __device__ Pieces(const u32* plane, int matrix, int first, int row_bytes) {
#pragma unroll
    for (int i = 0; i < OF_THREAD; i++) {
      int row = first + at(i) / COUNT;
      long existing = (long)matrix * W::OUT + (row < W::OUT ? row : W::OUT - 1);
      from[i] = (const char*)plane + existing * row_bytes + at(i) % COUNT * 16;
    }
  }

  __device__ static int at(int i) { return 32 * i + threadIdx.x % 32; }

  __device__ void copy(char* to, int offset) const {
#pragma unroll
    for (int i = 0; i < OF_THREAD; i++) {
      if (16 * COUNT % 32 && at(i) >= 16 * COUNT) continue;
      if (Round<W>::PARTIAL && offset + at(i) % COUNT * 16 >= W::COLUMNS / Unit<W>::PER_BYTE) continue;
      start_copy<16>(to + at(i) % COUNT * Round<W>::PIECE_BYTES + at(i) / COUNT * 16, from[i] + offset);
    }
  }
};

// As many rows of a tile, of some bytes each, as shared memory has room for: a multiple of 8.
__device__ constexpr int slab_rows(int bytes, int rows = TILE) {
  return rows * bytes <= SHARED ? rows : slab_rows(bytes, (rows / 2 + 7) / 8 * 8);
}

// Neighbors that are stored together.
template <class Y>
struct alignas(4 * sizeof(Y)) Four {
  Y at[4];
};

template <class W, int STAGES, class Rows, class Y>
__device__ void multiply(const W& w, const Activations& x, const Rows& rows, int program, int part,
                         Y* y) {
  typedef Round<W> R;
  typedef typename R::U U;
  constexpr int OF_PART = (R::COUNT + PARTS - 1) / PARTS, THREADS = 32 * WARPS;
  constexpr bool BULK = HAS_WARPGROUPS && Rows::ADJACENT;
  // Rounds that are copied ahead: one place less, so that nobody waits for the products of a round
  // before the next one begins, if there are three places.
  constexpr int AHEAD = STAGES > 2 ? STAGES - 2 : 1;
  // With two places, both are filled before the first round.
  constexpr int FIRST = BULK && STAGES == 2 ? 2 : AHEAD;
  // Where products are waited for in each round, the next one is copied while the first are under
  // way; elsewhere the assembler would let each product wait for the one before.
  constexpr bool WAITS = !BULK && STAGES == 2;
  typedef Scales<W, AHEAD> S;
  static_assert(STAGES * R::STAGE_BYTES + WARPS * S::BYTES <= SHARED, "all of it fits");
  int warp = warp_index(), lane = threadIdx.x % 32, quad = lane / 4, member = lane % 4;
  int first = (program * WARPS + warp) * 16, matrix = rows.matrix();
  u32 begin = part * OF_PART, stop = begin + OF_PART < R::COUNT ? begin + OF_PART : R::COUNT;
  char* scales = dynamic_shared + STAGES * R::STAGE_BYTES + warp * S::BYTES;
  // A row of the warp in the plane; those that do not exist are the last one.
  auto row_of = [&](int i) {
    return (long)matrix * W::OUT + (first + i < W::OUT ? first + i : W::OUT - 1);
  };

  // The thread's pieces of a tile: where they are in a block of 64 columns, in bytes.
  constexpr int OF_THREAD = (8 * TILE + THREADS - 1) / THREADS;
  u32 source[OF_THREAD];
#pragma unroll
  for (int i = 0; i < OF_THREAD; i++) {
    int at = i * THREADS + threadIdx.x, row = rows.source(at / 8 < TILE ? at / 8 : TILE - 1);
    source[i] = 128 * row + 16 * (at % 8 ^ at / 8 % 8 ^ row % 8);
  }
  Pieces<W, 4> codes_of(w.first, matrix, first, W::COLUMNS / U::PER_BYTE);
  constexpr int MORE = R::SECOND ? R::SECOND / 16 : 1;
  Pieces<W, MORE> more_of(w.second, matrix, first, W::COLUMNS / 8 * W::BITS1);

  // A bulk copy of tiles, once all warps have multiplied those in its place.
  __shared__ Arrivals copied[STAGES], multiplied[STAGES];
  auto fetch_tiles = [&](u32 round) {
    u32 turn = (round - begin) / STAGES, place = (round - begin) % STAGES;
    char* to = dynamic_shared + place * R::STAGE_BYTES;
    int count = ROWS - rows.first < TILE ? ROWS - rows.first : TILE;
    wait_for_arrivals(multiplied + place, turn % 2 ^ 1);
    expect_bytes(copied + place, R::TILES * 128 * count);
#pragma unroll
    for (int tile = 0; tile < R::TILES; tile++) {
      u32 block = R::weight(round, tile) / 64;  // times zeros, if there is none
      block = R::PARTIAL && block >= W::COLUMNS / 64 ? W::COLUMNS / 64 - 1 : block;
      copy_bytes(to + tile * TILE_BYTES, x.values + 64l * (block * ROWS + rows.first), 128 * count,
                 copied + place);
    }
  };

  // A group of copies: of a round, if there is one.
  auto fetch = [&](u32 round) {
    if (round < stop) {
      char* stage = dynamic_shared + (round - begin) % STAGES * R::STAGE_BYTES;
      if (BULK && threadIdx.x == 0) fetch_tiles(round);
#pragma unroll
      for (int tile = 0; tile < (BULK ? 0 : R::TILES); tile++) {
        const char* from = (const char*)x.values + 128l * ROWS * (R::weight(round, tile) / 64);
#pragma unroll
        for (int i = 0; i < OF_THREAD; i++) {
          int at = i * THREADS + threadIdx.x;
          if (8 * TILE % THREADS && at >= 8 * TILE) continue;
          char* to = stage + tile * TILE_BYTES + 16 * at;
          if (R::PARTIAL && R::weight(round, tile) >= W::COLUMNS) {
            *(Words*)to = Words{};
          } else {
            start_copy<16>(to, from + source[i]);
          }
        }
      }
      char* codes = stage + R::TILES * TILE_BYTES + warp * R::PIECES * R::PIECE_BYTES;
      codes_of.copy(codes, 64 * round);
      if (R::SECOND) more_of.copy(codes + 4 * R::PIECE_BYTES, R::SECOND * (round / R::OF_CHUNK));
      S::copy(scales, w, row_of(lane % 16), round, round == begin);
    }
    end_group();
  };

  // Products of BATCH slices of 16 columns are begun together.
  constexpr int BATCHES = 4 * R::TILES / BATCH;
  static_assert(4 * R::TILES % BATCH == 0, "whole batches");
  u32 upper = in_register(UPPER_BYTE<X>);
  float total[TILE / 2] = {};
  u32 a[2][BATCH][4], words[4][2], second[4][2] = {}, of_group[2][R::TILES * R::SPANS];
  if (BULK) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < STAGES; i++) {
        start_arrivals(copied + i, 1);
        start_arrivals(multiplied + i, WARPS);
      }
      publish_arrivals();
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < FIRST; i++) fetch(begin + i);
#pragma unroll 1
  for (u32 round = begin; round < stop; round++) {
    u32 place = (round - begin) % STAGES;
    const char* tiles = dynamic_shared + place * R::STAGE_BYTES;
    const char* codes = tiles + R::TILES * TILE_BYTES + warp * R::PIECES * R::PIECE_BYTES;
    // What a thread needs of a row for a slice of a piece.
    auto load = [&](int piece, int i, int half) {
      int of_unit = R::unit_slice(piece, i), word = U::first_word(of_unit, member) % 4;
      const char* of_row = codes + 16 * (quad + 8 * half);
      words[piece][half] = *(const u32*)(of_row + piece * R::PIECE_BYTES + 4 * word);
      if (!R::SECOND) return;
      int at = R::second_byte(piece, of_unit, member, R::place(round, piece));
      second[piece][half] = *(const u32*)(of_row + (4 + at / 16) * R::PIECE_BYTES + at % 16);
    };

    bool is_filled = FIRST > AHEAD && round == begin;
    is_filled ? wait_for_groups<FIRST - 1>() : wait_for_groups<AHEAD - 1>();
    if (BULK) {
      wait_for_warp();
    } else {
      publish_copies();
      __syncthreads();
    }
#pragma unroll
    for (int piece = 0; piece < 4; piece++) {
      for (int half = 0; half < 2; half++) load(piece, 0, half);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      S::load_round(of_group[half], scales, quad + 8 * half, row_of(quad + 8 * half), round);
    }
    if (BULK) wait_for_arrivals(copied + place, (round - begin) / STAGES % 2);
    if (!WAITS && !is_filled) fetch(round + AHEAD);
#pragma unroll
    for (int batch = 0; batch < BATCHES; batch++) {
      u32(*operands)[4] = a[batch % 2];
#pragma unroll
      for (int k = 0; k < 2 * BATCH; k++) {
        int n = batch * BATCH + k / 2, piece = n / R::TILES, i = n % R::TILES, half = k % 2;
        int of_unit = R::unit_slice(piece, i), slice = R::slice(piece, i);
        if (W::TRELLIS && i) load(piece, i, half);
        u32 word = words[piece][half], more = second[piece][half], at = R::place(round, piece);
        u32 four = U::bytes_of(word, more, of_unit, member, at);
        u32 scale = of_group[half][slice * 16 / R::SPAN];
        dequantize<W>(four, scale, upper, operands[k / 2] + half, 2);
      }
      begin_products();
#pragma unroll
      for (int k = 0; k < BATCH; k++) {
        int n = batch * BATCH + k;
        multiply_tile(total, operands[k], tiles, R::slice(n / R::TILES, n % R::TILES));
      }
      end_products();
      if (WAITS && !batch) fetch(round + AHEAD);
      wait_for_products<1>();
    }
    if (BULK || WAITS) wait_for_products<0>();
    if (BULK && lane == 0) arrive(multiplied + place);
  }
  wait_for_products<0>();

  // Results of neighboring rows of the matrix are stored together.
  constexpr int WIDTH = 16 * WARPS, STRIDE = WIDTH + 4;
  constexpr int SLAB = slab_rows(4 * STRIDE);
  float* results = (float*)dynamic_shared;
  find_factors(x.squares, [&](int i) { return rows.source(i); });
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
#pragma unroll 4
    for (int at = threadIdx.x; at < SLAB * WIDTH / 4; at += THREADS) {
      int i = slab + at / (WIDTH / 4), column = at % (WIDTH / 4) * 4;
      int of_matrix = program * WIDTH + column, count = W::OUT - of_matrix;
      if (i >= TILE || rows.result(i) >= rows.stop() || count <= 0) continue;
      Words four = *(const Words*)(results + (i - slab) * STRIDE + column);
      float factor = Codes<W>::RESULT * (RMS_PARTS ? factors[i] : 1);
      Y* to = y + ((long)part * RESULTS + rows.result(i)) * W::OUT + of_matrix;
      Four<Y> products;
      for (int j = 0; j < 4; j++) store(products.at + j, bits_float(four.at[j]) * factor);
      if (W::OUT % 4 == 0) {
        *(Four<Y>*)to = products;
      } else {
        for (int j = 0; j < 4 && j < count; j++) to[j] = products.at[j];
      }
    }
  }
}
