// Rows in 8 bits, as `Int8Rows`: a scale for each 32 neighbors, slices of 16 codes swizzled over
// banks.

__device__ inline int swizzled(int slice) { return slice ^ ((slice >> 3) & 7); }

struct Int8Rows {
  u32* codes;        // [rows, padded columns / 4]
  float* scale;      // [rows, columns / 32]
  float* sums;       // [rows, columns / 32]
  float* half_sums;  // [rows, columns / 16]

  // Rounds and stores four neighbors from `column` on. Eight threads in a row call it together, for
  // 32 neighbors; all threads of a warp call it.
  __device__ void store_quad(const float* x, int row, int column, int columns, bool exists) const {
    // Compared as integers, magnitudes have their order, with NaN above infinity.
    u32 largest = 0;
    for (int i = 0; i < 4; i++) {
      u32 bits = float_bits(x[i]) & 0x7fffffffu;
      largest = bits > largest ? bits : largest;
    }
    for (int d = 4; d; d /= 2) {
      u32 other = exchange(largest, d);
      largest = other > largest ? other : largest;
    }
    float scale_ = bits_float(largest) / 127, inverse = scale_ > 0 ? 1 / scale_ : 0;
    u32 word = 0;
    int sum = 0;
    for (int i = 0; i < 4; i++) {
      int code = round_to_int(x[i] * inverse < 127 ? x[i] * inverse : 127);
      word |= (u32)(code & 255) << (8 * i);
      sum += code;
    }
    for (int d = 2; d; d /= 2) sum += exchange(sum, d);
    float half = sum * scale_;
    float whole = half + exchange(half, 4);
    if (!exists) return;
    int slice = column / 16, padded = (columns + 127) / 128 * 128;
    codes[(long)row * (padded / 4) + 4 * swizzled(slice) + column / 4 % 4] = word;
    if (column % 16 == 0) half_sums[(long)row * (columns / 16) + slice] = half;
    if (column % 32 == 0) {
      scale[(long)row * (columns / 32) + column / 32] = scale_;
      sums[(long)row * (columns / 32) + column / 32] = whole;
    }
  }
};
