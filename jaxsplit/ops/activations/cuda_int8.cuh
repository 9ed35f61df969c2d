// Rows in 8 bits: a scale for each block of 32 neighbors.

// Four neighbors, rounded.
struct Int8Quad {
  u32 codes;
  float scale, sum, half_sum;  // of the block, the block, and its half
};

// Eight threads in a row call it together, for a block; all threads of a warp call it.
__device__ inline Int8Quad rounded_quad(const float* x) {
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
  Int8Quad y = {};
  y.scale = bits_float(largest) / 127;
  float inverse = y.scale > 0 ? 1 / y.scale : 0;
  int sum = 0;
  for (int i = 0; i < 4; i++) {
    int code = round_to_int(x[i] * inverse < 127 ? x[i] * inverse : 127);
    y.codes |= (u32)(code & 255) << (8 * i);
    sum += code;
  }
  for (int d = 2; d; d /= 2) sum += exchange(sum, d);
  y.half_sum = sum * y.scale;
  y.sum = y.half_sum + exchange(y.half_sum, 4);
  return y;
}

// Row by row, slices of 16 codes swizzled over banks. As those below, it stores four neighbors from
// `column` on.
struct Int8Rows {
  u32* codes;        // [rows, padded columns / 4]
  float* scale;      // [rows, columns / 32]
  float* sums;       // [rows, columns / 32]
  float* half_sums;  // [rows, columns / 16]

  __device__ void store_quad(const float* x, int row, int column, int rows, int columns,
                             bool exists) const {
    Int8Quad y = rounded_quad(x);
    if (!exists) return;
    int slice = column / 16, padded = (columns + 127) / 128 * 128;
    codes[(long)row * (padded / 4) + 4 * swizzled(slice) + column / 4 % 4] = y.codes;
    if (column % 16 == 0) half_sums[(long)row * (columns / 16) + slice] = y.half_sum;
    if (column % 32 == 0) {
      scale[(long)row * (columns / 32) + column / 32] = y.scale;
      sums[(long)row * (columns / 32) + column / 32] = y.sum;
    }
  }
};

// Block by block.
struct Int8Blocks {
  u32* codes;        // [columns / 32, rows, 4, 2]
  float* scale;      // [columns / 32, rows]
  float* sums;       // [columns / 32, rows]
  float* half_sums;  // [columns / 16, rows]

  __device__ void store_quad(const float* x, int row, int column, int rows, int columns,
                             bool exists) const {
    Int8Quad y = rounded_quad(x);
    if (!exists) return;
    int slice = column / 16, at = column / 32 * rows + row;
    codes[8 * at + 2 * (column / 4 % 4) + slice % 2] = y.codes;
    if (column % 16 == 0) half_sums[slice * rows + row] = y.half_sum;
    if (column % 32 == 0) {
      scale[at] = y.scale;
      sums[at] = y.sum;
    }
  }
};
