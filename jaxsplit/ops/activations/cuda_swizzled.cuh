// Rows in 16 bits, as operands of tensor cores: see `SwizzledRows`.

template <class T>
struct Swizzled {
  T* values;  // [columns / 64, rows, 64]

  // Where two neighbors are.
  __device__ T* pair(int row, int column, int rows) const {
    int piece = (column / 16 % 4 * 2 + column / 2 % 2) ^ (row % 8), member = column / 4 % 4;
    return values + ((long)(column / 64) * rows + row) * 64 + 8 * piece + 2 * member;
  }

  __device__ void store_quad(const float* x, int row, int column, int rows, int columns,
                             bool exists) const {
    if (!exists) return;
    for (int i = 0; i < 4; i++) store(pair(row, column + i / 2 * 2, rows) + i % 2, x[i]);
  }
};

template <class T>
Swizzled(T*) -> Swizzled<T>;
