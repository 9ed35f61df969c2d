// Rows, computed and rounded to 8 bits: a thread has four neighbors.
//
// `Operands` loads what `function` takes of a row and a column. ADDENDS parts are added to the first
// operand, whose sum is stored, and whose squares are summed if SQUARES.

constexpr int THREADS = 128, WIDTH = 4 * THREADS;

template <class Out>
__device__ void store_row(const Operands& operands, const float* parts, const Out& out,
                          float* squares, First* total) {
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
  out.store_quad(y, row, column, ROWS, COLUMNS, exists);
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
