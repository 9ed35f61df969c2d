// Rows, computed and rounded to 8 bits (Int8Rows): a thread has four neighbors, eight threads share
// a scale.
//
// `Operands` loads what `function` takes of a row and a column; `ADDENDS` parts are added to the
// first operand, whose sum is stored, and whose squares are summed if SQUARES.

constexpr int THREADS = 128, WIDTH = 4 * THREADS;

__device__ inline int swizzled(int slice) { return slice ^ ((slice >> 3) & 7); }

// Compared as integers, magnitudes have their order, with NaN above infinity.
__device__ inline u32 magnitude(float x) { return float_bits(x) & 0x7fffffffu; }

__device__ void store_row(const Operands& operands, const float* parts, First* total,
                          u32* codes, float* scales, float* sums, float* half_sums,
                          float* squares) {
  int row = blockIdx.x, thread = threadIdx.x, column = blockIdx.y * WIDTH + 4 * thread;
  bool exists = column < COLUMNS;
  float y[4] = {}, square = 0;
  if (exists) {
    for (int i = 0; i < 4; i++) {
      float x = operands.first(row, column + i);
      if (ADDENDS) {
        float sum = 0;
        for (int part = 0; part < ADDENDS; part++) {
          sum += parts[((long)part * ROWS + row) * COLUMNS + column + i];
        }
        First rounded;
        store(&rounded, x + sum);
        total[(long)row * COLUMNS + column + i] = rounded;
        x = load(&rounded);
      }
      square += x * x;
      y[i] = operands.function(x, row, column + i);
    }
  }
  u32 largest = 0;
  for (int i = 0; i < 4; i++) {
    u32 bits = magnitude(y[i]);
    largest = bits > largest ? bits : largest;
  }
  for (int d = 4; d; d /= 2) {
    u32 other = exchange(largest, d);
    largest = other > largest ? other : largest;
  }
  float scale = bits_float(largest) / 127, inverse = scale > 0 ? 1 / scale : 0;
  u32 word = 0;
  int sum = 0;
  for (int i = 0; i < 4; i++) {
    int code = round_to_int(y[i] * inverse < 127 ? y[i] * inverse : 127);
    word |= (u32)(code & 255) << (8 * i);
    sum += code;
  }
  for (int d = 2; d; d /= 2) sum += exchange(sum, d);
  float half = sum * scale;
  float whole = half + exchange(half, 4);
  if (exists) {
    int slice = column / 16;
    codes[(long)row * (PADDED / 4) + 4 * swizzled(slice) + thread % 4] = word;
    if (thread % 4 == 0) half_sums[(long)row * (COLUMNS / 16) + slice] = half;
    if (thread % 8 == 0) {
      scales[(long)row * (COLUMNS / 32) + column / 32] = scale;
      sums[(long)row * (COLUMNS / 32) + column / 32] = whole;
    }
  }
  if (SQUARES) {
    __shared__ float warps[THREADS / 32];
    for (int d = 16; d; d /= 2) square += exchange(square, d);
    if (thread % 32 == 0) warps[thread / 32] = square;
    __syncthreads();
    if (thread == 0) {
      for (int i = 1; i < THREADS / 32; i++) square += warps[i];
      squares[row * PROGRAMS + blockIdx.y] = square;
    }
  }
}
