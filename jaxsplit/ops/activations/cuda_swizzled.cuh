// Rows in 16 bits, as operands of tensor cores: see `SwizzledRows`.

template <class T>
struct Swizzled {
  T* values;  // [columns / 64, rows, 64]

  __device__ void store_quad(const float* x, int row, int column, int rows, int columns,
                             bool exists) const {
    if (!exists) return;
    int slice = column / 16 % 4, member = column / 4 % 4;
    T* to = values + ((long)(column / 64) * rows + row) * 64;
    for (int i = 0; i < 4; i++) {
      int piece = (2 * slice + i / 2) ^ (row % 8);
      store(to + 8 * piece + 2 * member + i % 2, x[i]);
    }
  }
};

template <class T>
Swizzled(T*) -> Swizzled<T>;
