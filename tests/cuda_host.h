// CUDA C++ on a CPU, to test kernels without a GPU: a thread for each thread of a block, one block
// after the other. Takes the place of jaxsplit/cuda/device.cuh.

#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads, blocks)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

struct alignas(16) Words {
  u32 at[4];
};

struct Index {
  int x, y, z;
};

static thread_local Index threadIdx, blockIdx;
static Index gridDim;
static std::unique_ptr<std::barrier<>> together;
static u32 exchanged[1024];

static inline void __syncthreads() { together->arrive_and_wait(); }

static inline Words load_words(const void* p) {
  Words y;
  std::memcpy(&y, p, sizeof y);
  return y;
}

static inline u32 load_word(const void* p) {
  u32 y;
  std::memcpy(&y, p, sizeof y);
  return y;
}

static inline u32 load_raw(const u16* p) { return *p; }
static inline u32 load_raw(const u8* p) { return *p; }

static inline float half_to_float(u32 bits) {
  u16 given = (u16)bits;
  _Float16 y;
  std::memcpy(&y, &given, sizeof y);
  return (float)y;
}

static inline u16 float_to_half(float x) {
  _Float16 rounded = (_Float16)x;
  u16 y;
  std::memcpy(&y, &rounded, sizeof y);
  return y;
}

static inline u32 float_bits(float x) {
  u32 y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

static inline int dot4(u32 a, u32 b, int c) {
  for (int i = 0; i < 32; i += 8) c += (signed char)(a >> i) * (signed char)(b >> i);
  return c;
}

template <class T>
static T exchange(T x, int distance) {
  T y;
  std::memcpy(&exchanged[threadIdx.x], &x, sizeof x);
  __syncthreads();
  std::memcpy(&y, &exchanged[threadIdx.x ^ distance], sizeof y);
  __syncthreads();
  return y;
}

static inline float bits_float(u32 bits) {
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

static inline float fresh(const float* p) { return *p; }

static inline void fence() {}

static inline int atomic_add(int* p, int x) {  // blocks run one after the other
  int before = *p;
  *p += x;
  return before;
}

static inline int round_to_int(float x) { return (int)std::nearbyint(x); }

static inline float inverse_root(float x) { return 1 / std::sqrt(x); }

template <class... A, std::size_t... I>
static void call(void (*kernel)(A...), void** pointers, std::index_sequence<I...>) {
  kernel((A)pointers[I]...);
}

template <class... A>
static void launch(void (*kernel)(A...), void** pointers, const int* grid, int threads) {
  gridDim = {grid[0], grid[1], grid[2]};
  for (int block = 0; block < grid[0] * grid[1] * grid[2]; block++) {
    together = std::make_unique<std::barrier<>>(threads);
    std::vector<std::thread> running;
    for (int i = 0; i < threads; i++) {
      running.emplace_back([=] {
        threadIdx = {i, 0, 0};
        blockIdx = {block % grid[0], block / grid[0] % grid[1], block / grid[0] / grid[1]};
        call(kernel, pointers, std::index_sequence_for<A...>());
      });
    }
    for (auto& one : running) one.join();
  }
}
