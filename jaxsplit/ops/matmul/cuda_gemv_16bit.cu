// A few rows of activations times plain matrices, all in 16 bits.
//
// A warp has TILE rows of a matrix, and all ROWS of activations. Its threads load STEPS runs of
// eight neighbors of each row of the matrix before they multiply.

template <class W, class X, class Y>
__device__ void multiply(const W* w, int outputs, const X* x, int program, Y* y) {
  constexpr int RUNS = COLUMNS / 8, ROUND = 32 * STEPS;
  int lane = threadIdx.x % 32, first = (program * WARPS + threadIdx.x / 32) * TILE;
  float total[ROWS][TILE] = {};
#pragma unroll 1
  for (int round = 0; round < RUNS; round += ROUND) {
    Run<W> runs[STEPS][TILE];
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      int run = round + 32 * s + lane;
#pragma unroll
      for (int i = 0; i < TILE; i++) {
        long row = first + i < outputs ? first + i : outputs - 1;
        bool exists = RUNS % ROUND == 0 || run < RUNS;
        runs[s][i].words = exists ? load_words(w + row * COLUMNS + 8 * run) : Words{};
      }
    }
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      int run = round + 32 * s + lane;
      if (RUNS % ROUND && run >= RUNS) continue;
      float weights[TILE][8];
#pragma unroll
      for (int i = 0; i < TILE; i++) {
#pragma unroll
        for (int k = 0; k < 8; k++) weights[i][k] = runs[s][i].at(k);
      }
#pragma unroll
      for (int row = 0; row < ROWS; row++) {
        Run<X> other;
        other.load(x + row * COLUMNS + 8 * run, true);
#pragma unroll
        for (int k = 0; k < 8; k++) {
          float value = other.at(k);
#pragma unroll
          for (int i = 0; i < TILE; i++) total[row][i] = fmaf(weights[i][k], value, total[row][i]);
        }
      }
    }
  }
#pragma unroll
  for (int row = 0; row < ROWS; row++) {
#pragma unroll
    for (int i = 0; i < TILE; i++) {
      float sum = total[row][i];
#pragma unroll
      for (int d = 16; d; d /= 2) sum += exchange(sum, d);
      if (lane == row * TILE + i && first + i < outputs) {
        store(y + (long)row * outputs + first + i, sum);
      }
    }
  }
}
