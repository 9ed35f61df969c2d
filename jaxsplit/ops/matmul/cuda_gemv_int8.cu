// One or two rows of activations in 8 bits, times quantized matrices.
//
// RMS_PARTS, RMS_SIZE and RMS_EPSILON describe a deferred normalization; 0 parts: there is none.
// LANES threads share a row of a matrix; each works on ROWS rows, and loads STEPS units of each
// before it multiplies.

constexpr int THREADS = 128;

struct Activations {
  const u32* codes;        // [rows, PADDED / 4], slices of 16 codes swizzled over banks
  const float* scale;      // [rows, COLUMNS / 32]
  const float* sums;       // [rows, COLUMNS / 32]
  const float* half_sums;  // [rows, COLUMNS / 16]
  const float* squares;    // [rows, PARTS]; null: the rows are final
};

// ROWS * THREADS / LANES rows of a matrix, for X rows of activations from `x_row` on.
template <class W, int X, int LANES, int ROWS, int STEPS, class T>
__device__ void multiply(const W& w, const Activations& x, long stacked, int x_row, int program,
                         T* y, int y_row) {
  typedef Unit<W> U;
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
          decltype(W::scale_value(0)) scaled[ROWS] = {};
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
            float sum = U::BELOW ? sums[U::weight(chunk[s], place[s], i) / (16 * U::SEGMENT)] : 0;
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
              const U& unit = units[s][r];
              scaled[r] += W::scale_value(unit.scale[i]) * dots[r];
              if (U::BELOW) below[r] += U::minimum_of(unit.scale[i], unit.minimum[i]) * sum;
            }
          }
#pragma unroll
          for (int r = 0; r < ROWS; r++) y[r] += (float)scaled[r] * scale;
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          const U& unit = units[s][r];
          y[r] *= U::outer_of(unit.super_scale);
          if (U::BELOW) below[r] *= U::outer_below_of(unit.super_scale, unit.super_minimum);
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
