// One or two rows of activations in 8 bits, times quantized matrices.
//
// RMS_PARTS, RMS_SIZE and RMS_EPSILON describe a deferred normalization; 0 parts: there is none.
// `W` describes a matrix: constants, and pointers to its planes (jaxsplit/quant/qtensor.py).
// A unit is what a thread multiplies of a row at a time: a chunk of the first plane if that is at
// most 32 bytes, else 16 bytes. LANES threads share a row; each works on ROWS rows, and loads STEPS
// units of each before it multiplies.

constexpr int THREADS = 128;

struct Activations {
  const u32* codes;        // [rows, PADDED / 4], slices of 16 codes swizzled over banks
  const float* scale;      // [rows, COLUMNS / 32]
  const float* sums;       // [rows, COLUMNS / 32]
  const float* half_sums;  // [rows, COLUMNS / 16]
  const float* squares;    // [rows, PARTS]; null: the rows are final
};

// The codes of four neighbors, their offset subtracted: borrows stay within each byte.
template <int OFFSET>
__device__ inline u32 signed_codes(u32 codes) {
  if (OFFSET == 0) return codes;
  return ((codes | 0x80808080u) - OFFSET * 0x01010101u) ^ 0x80808080u;
}

template <class W>
struct Unit {
  static constexpr int PER_BYTE = 8 / W::BITS0;
  static constexpr int CHUNK_BYTES = W::CHUNK / PER_BYTE;
  static constexpr bool WHOLE = CHUNK_BYTES <= 32;
  static constexpr int BYTES = WHOLE ? CHUNK_BYTES : 16;
  static constexpr int PER_CHUNK = CHUNK_BYTES / BYTES;
  static constexpr int IN_ROW = W::COLUMNS / W::CHUNK * PER_CHUNK;
  static constexpr int SLICES = PER_BYTE * BYTES / 16;
  // Bytes of a chunk in the second plane, and words of a unit there.
  static constexpr int SECOND = W::BITS1 ? W::CHUNK * W::BITS1 / 8 : 0;
  static constexpr int SECOND_WORDS = SECOND == 0 ? 0 : !WHOLE ? 4 : SECOND / 4;
  static_assert(WHOLE || SECOND == 0 || SECOND >= 16, "a unit is in one place of the second plane");
  // Slices that share a scale are summed as integers.
  static constexpr int SEGMENT = WHOLE && W::GROUP >= 32 ? 2 : 1;
  static constexpr int SEGMENTS = SLICES / SEGMENT;
  // Neighboring segments share a scale of the activations, too.
  static constexpr int PAIR = WHOLE && SEGMENT == 1 ? 2 : 1;

  u32 first[BYTES / 4];
  u32 second[SECOND_WORDS ? SECOND_WORDS : 1];
  u32 scale[SEGMENTS], minimum[SEGMENTS], super_scale, super_minimum;

  // The first weight of a segment, given the unit's chunk and its place in the chunk.
  __device__ static int weight(int chunk, int place, int segment) {
    int slice = segment * SEGMENT, i = slice / (BYTES / 16), j = slice % (BYTES / 16);
    return chunk * W::CHUNK + i * CHUNK_BYTES + place * BYTES + j * 16;
  }

  __device__ void load_codes(const W& w, long row, int chunk, int place) {
    const char* from = (const char*)w.first + row * (W::COLUMNS / PER_BYTE);
    from += chunk * CHUNK_BYTES + place * BYTES;
#pragma unroll
    for (int i = 0; i < BYTES / 16; i++) {
      Words y = load_words(from + 16 * i);
#pragma unroll
      for (int k = 0; k < 4; k++) first[4 * i + k] = y.at[k];
    }
    if (SECOND == 0) return;
    from = (const char*)w.second + row * (W::COLUMNS / 8 * W::BITS1) + chunk * SECOND;
    if (!WHOLE) from += place * BYTES % (SECOND ? SECOND : 1);
    if (SECOND_WORDS % 4) {
#pragma unroll
      for (int i = 0; i < SECOND_WORDS; i++) second[i] = load_word(from + 4 * i);
    } else {
#pragma unroll
      for (int i = 0; i < SECOND_WORDS / 4; i++) {
        Words y = load_words(from + 16 * i);
#pragma unroll
        for (int k = 0; k < 4; k++) second[4 * i + k] = y.at[k];
      }
    }
  }

  __device__ void load_scales(const W& w, long row, int chunk, int place) {
#pragma unroll
    for (int i = 0; i < SEGMENTS; i++) {
      int group = weight(chunk, place, i) / W::GROUP;
      scale[i] = load_raw(w.scale + row * (W::COLUMNS / W::GROUP) + group);
      if (W::MINIMUM) minimum[i] = load_raw(w.minimum + row * (W::COLUMNS / W::GROUP) + group);
    }
    if (W::SUPER) {
      constexpr int SUPER = W::SUPER ? W::SUPER : 1;
      long at = row * (W::COLUMNS / SUPER) + chunk * W::CHUNK / SUPER;
      super_scale = load_raw(w.super_scale + at);
      if (W::MINIMUM) super_minimum = load_raw(w.super_minimum + at);
    }
  }

  // Four codes: those of word `k` of a slice.
  __device__ u32 codes(int slice, int k, int place) const {
    int i = slice / (BYTES / 16), j = slice % (BYTES / 16);
    u32 y = first[4 * j + k];
    if (W::BITS0 < 8) y = (y >> (i * W::BITS0)) & (0x01010101u * ((1 << W::BITS0) - 1));
    if (SECOND) {
      // The bit and the word where these codes are in the chunk of the second plane.
      int byte = i * CHUNK_BYTES + place * BYTES + 16 * j + 4 * k;
      int word = WHOLE ? byte % (SECOND ? SECOND : 1) / 4 : k;
      u32 more = second[word] >> (byte / (SECOND ? SECOND : 1) * W::BITS1);
      y |= (more & (0x01010101u * ((1 << W::BITS1) - 1))) << W::BITS0;
    }
    return signed_codes<W::OFFSET>(y);
  }
};

// ROWS * THREADS / LANES rows of a matrix, for X rows of activations from `x_row` on.
template <class W, int X, int LANES, int ROWS, int STEPS, class T>
__device__ void multiply(const W& w, const Activations& x, long stacked, int x_row, int program,
                         T* y, int y_row) {
  typedef Unit<W> U;
  typedef Raw<typename W::Scale> S;
  constexpr int ROUND = LANES * STEPS, ROUNDS = (U::IN_ROW + ROUND - 1) / ROUND;
  constexpr int PADDED = (W::COLUMNS + 127) / 128 * 128;
  int lane = threadIdx.x % LANES, team = threadIdx.x / LANES;
  int row0 = (program * (THREADS / LANES) + team) * ROWS;
  float total[X][ROWS] = {};
#pragma unroll 1
  for (int round = 0; round < ROUNDS; round++) {
    U units[STEPS][ROWS];
    int chunk[STEPS], place[STEPS];
    bool exists[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      int unit = round * ROUND + s * LANES + lane;
      exists[s] = U::IN_ROW % ROUND == 0 || unit < U::IN_ROW;
      unit = exists[s] ? unit : 0;
      chunk[s] = unit / U::PER_CHUNK;
      place[s] = unit % U::PER_CHUNK;
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        int row = row0 + r < W::OUT ? row0 + r : W::OUT - 1;
        units[s][r].load_codes(w, stacked + row, chunk[s], place[s]);
      }
    }
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        int row = row0 + r < W::OUT ? row0 + r : W::OUT - 1;
        units[s][r].load_scales(w, stacked + row, chunk[s], place[s]);
      }
    }
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      if (!exists[s]) continue;
#pragma unroll
      for (int m = 0; m < X; m++) {
        const u32* codes = x.codes + (long)(x_row + m) * (PADDED / 4);
        const float* scales = x.scale + (long)(x_row + m) * (W::COLUMNS / 32);
        const float* sums = U::SEGMENT == 2 ? x.sums + (long)(x_row + m) * (W::COLUMNS / 32)
                                            : x.half_sums + (long)(x_row + m) * (W::COLUMNS / 16);
        float y[ROWS] = {}, below[ROWS] = {};
#pragma unroll
        for (int first = 0; first < U::SEGMENTS; first += U::PAIR) {
          int weight = U::weight(chunk[s], place[s], first);
          float scale = scales[weight / 32];
          decltype(S::value(0)) scaled[ROWS] = {};
#pragma unroll
          for (int i = first; i < first + U::PAIR; i++) {
            int dots[ROWS] = {};
#pragma unroll
            for (int j = 0; j < U::SEGMENT; j++) {
              int slice = i * U::SEGMENT + j;
              int at = swizzled(U::weight(chunk[s], place[s], i) / 16 + j);
              Words other = *(const Words*)(codes + 4 * at);
#pragma unroll
              for (int k = 0; k < 4; k++) {
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                  dots[r] = dot4(units[s][r].codes(slice, k, place[s]), other.at[k], dots[r]);
                }
              }
            }
            float sum = W::MINIMUM ? sums[U::weight(chunk[s], place[s], i) / (16 * U::SEGMENT)] : 0;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
              scaled[r] += S::value(units[s][r].scale[i]) * dots[r];
              if (W::MINIMUM) below[r] += (float)Raw<typename W::Minimum>::value(units[s][r].minimum[i]) * sum;
            }
          }
#pragma unroll
          for (int r = 0; r < ROWS; r++) y[r] += (float)scaled[r] * scale;
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          if (W::SUPER) y[r] *= half_to_float(units[s][r].super_scale);
          if (W::SUPER && W::MINIMUM) below[r] *= half_to_float(units[s][r].super_minimum);
          total[m][r] += y[r] + below[r];
        }
      }
    }
  }
  // Sums over the lanes.
  __shared__ float parts[THREADS / 32][X][ROWS];
#pragma unroll
  for (int m = 0; m < X; m++) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
      for (int d = 16; d; d /= 2) total[m][r] += exchange(total[m][r], d);
      if (LANES > 32 && threadIdx.x % 32 == 0) parts[threadIdx.x / 32][m][r] = total[m][r];
    }
  }
  if (LANES > 32) {
    __syncthreads();
#pragma unroll
    for (int m = 0; m < X; m++) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        total[m][r] = 0;
#pragma unroll
        for (int i = 0; i < LANES / 32; i++) total[m][r] += parts[team * (LANES / 32) + i][m][r];
      }
    }
  }
#pragma unroll
  for (int m = 0; m < X; m++) {
    float factor = 1;
    if (RMS_PARTS) {
      float squares = 0;
      for (int i = lane % 32; i < RMS_PARTS; i += 32) {
        squares += x.squares[(x_row + m) * RMS_PARTS + i];
      }
#pragma unroll
      for (int d = 16; d; d /= 2) squares += exchange(squares, d);
      factor = inverse_root(squares / RMS_SIZE + RMS_EPSILON);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if (lane == r && row0 + r < W::OUT) {
        store(y + (long)(y_row + m) * W::OUT + row0 + r, total[m][r] * factor);
      }
    }
  }
}
