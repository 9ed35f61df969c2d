// CUDA C++ on a CPU, to test kernels without a GPU: the threads of a block take turns, each until it
// waits for others; one block runs after the other. Takes the place of jaxsplit/cuda/device.cuh.

#include <csetjmp>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

using std::max;
using std::min;

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

static Index threadIdx, blockIdx, gridDim;
static u32 exchanged[1024][8];

struct Barrier {
  int members, arrived = 0, passed = 0;
};

struct Thread {
  ucontext_t context;
  std::jmp_buf resumed;
  std::unique_ptr<char[]> stack;
  bool started, done;
};

constexpr std::size_t STACK_BYTES = 1 << 18;
static std::jmp_buf scheduler;
static std::vector<Thread> threads_of_block;
static std::vector<Barrier> warps;
static Barrier block;
static bool progress;

// Jumps, since `swapcontext` calls the kernel each time.
static inline void take_turns() {
  if (!setjmp(threads_of_block[threadIdx.x].resumed)) std::longjmp(scheduler, 1);
}

static void run_thread(int thread) {
  auto& one = threads_of_block[thread];
  threadIdx = {thread, 0, 0};
  if (setjmp(scheduler)) return;
  if (one.started) std::longjmp(one.resumed, 1);
  one.started = true;
  setcontext(&one.context);
}

static inline void wait_at(Barrier& barrier) {
  progress = true;
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    barrier.passed++;
    return;
  }
  int passed = barrier.passed;
  while (barrier.passed == passed) take_turns();
}

static inline void __syncthreads() { wait_at(block); }
static inline void wait_for_warp() { wait_at(warps[threadIdx.x / 32]); }

static inline void wait_for_inputs() {}

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

static inline u16 float_to_bfloat16(float x) {
  u32 bits = float_bits(x), rounded = bits + 0x7fffu + (bits >> 16 & 1);
  return std::isnan(x) ? 0x7fc0 : (u16)(rounded >> 16);
}

static inline int dot4(u32 a, u32 b, int c) {
  for (int i = 0; i < 32; i += 8) c += (signed char)(a >> i) * (signed char)(b >> i);
  return c;
}

template <class T>
static T exchange(T x, int distance) {
  T y;
  std::memcpy(exchanged[threadIdx.x], &x, sizeof x);
  wait_for_warp();
  std::memcpy(&y, exchanged[threadIdx.x ^ distance], sizeof x);
  wait_for_warp();
  return y;
}

static u32 from_quad(u32 x, int member) {
  exchanged[threadIdx.x][0] = x;
  wait_for_warp();
  u32 y = exchanged[threadIdx.x / 4 * 4 + member][0];
  wait_for_warp();
  return y;
}

static inline u32 pick_bytes(u32 low, u32 high, u32 which) {
  u32 y = 0;
  for (int i = 0; i < 4; i++) {
    int at = which >> (4 * i) & 15;
    if (at > 7) std::abort();
    y |= ((at < 4 ? low : high) >> (8 * (at % 4)) & 255) << (8 * i);
  }
  return y;
}

static inline u32 fill_bytes(u32 x) { return (x >> 7 & 0x01010101u) * 255; }

static inline u32 both_lower(u32 x) { return pick_bytes(x, 0, 0x1010); }
static inline u32 both_upper(u32 x) { return pick_bytes(x, 0, 0x3232); }

static inline u32 in_register(u32 x) { return x; }

static inline void add_to_shared(int* p, int x) { *p += x; }

static inline int warp_index() {
  wait_for_warp();  // all of its threads exchange it
  return threadIdx.x / 32;
}

// Products of 16 rows of codes with 8 columns: threads have WORDS words of rows, half as many of
// columns.
template <int WORDS>
static void multiply_codes(int* y, const u32* a, const u32* b, int start) {
  int thread = threadIdx.x, warp = thread / 32 * 32, member = thread % 4;
  for (int i = 0; i < WORDS; i++) exchanged[thread][i] = a[i];
  for (int i = 0; i < WORDS / 2; i++) exchanged[thread][WORDS + i] = b[i];
  wait_for_warp();
  for (int i = 0; i < 4; i++) {
    int row = warp + thread % 32 / 4 * 4, column = warp + (2 * member + i % 2) * 4;
    y[i] = start;
    for (int half = 0; half < WORDS / 2; half++) {
      for (int other = 0; other < 4; other++) {
        u32 codes = exchanged[row + other][2 * half + i / 2];
        y[i] = dot4(codes, exchanged[column + other][WORDS + half], y[i]);
      }
    }
  }
  wait_for_warp();
}

static void multiply_16(int* y, const u32* a, u32 b, int start) {
  multiply_codes<2>(y, a, &b, start);
}

static void multiply_32(int* y, const u32* a, const u32* b, int start) {
  multiply_codes<4>(y, a, b, start);
}

static inline float bits_float(u32 bits);

typedef char* SharedAddress;
static inline SharedAddress shared_address(const void* p) { return (char*)p; }

// Copies to shared memory take place when they are waited for.
struct Copy {
  void* to;
  const void* from;
  int bytes;
};

alignas(1024) static char dynamic_shared[1 << 18];
static std::vector<std::vector<Copy>> groups_of_threads[1024];  // the last one is not ended yet

template <int BYTES>
static void start_copy(void* to, const void* from) {
  if ((std::size_t)to % BYTES || (std::size_t)from % BYTES) std::abort();
  auto& groups = groups_of_threads[threadIdx.x];
  if (groups.empty()) groups.emplace_back();
  groups.back().push_back({to, from, BYTES});
}

static inline void start_copy_or_zeros(SharedAddress to, const void* from, bool exists) {
  static const Words nothing = {};
  start_copy<16>(to, exists ? from : &nothing);
}

static inline void end_group() {
  auto& groups = groups_of_threads[threadIdx.x];
  if (groups.empty()) groups.emplace_back();
  groups.emplace_back();
}

template <int NEWEST>
static void wait_for_groups() {
  auto& groups = groups_of_threads[threadIdx.x];
  while ((int)groups.size() - 1 > NEWEST) {
    for (const Copy& one : groups.front()) std::memcpy(one.to, one.from, one.bytes);
    groups.erase(groups.begin());
  }
}

static inline void publish_copies() {}

// Bulk copies take place when the last of them is waited for.
struct Arrivals {
  int members, arrived, ended, bytes;
  std::vector<Copy> copies;
};

static inline void start_arrivals(Arrivals* p, int count) { *p = {count, 0, 0, 0, {}}; }
static inline void publish_arrivals() {}

static inline void arrive(Arrivals* p) {
  progress = true;
  if (++p->arrived == p->members && !p->bytes) p->arrived = 0, p->ended++;
}

static inline void expect_bytes(Arrivals* p, int bytes) {
  p->bytes += bytes;
  arrive(p);
}

static inline void copy_bytes(void* to, const void* from, int bytes, Arrivals* p) {
  if ((std::size_t)to % 16 || (std::size_t)from % 16 || bytes % 16) std::abort();
  p->copies.push_back({to, from, bytes});
}

static inline void wait_for_arrivals(Arrivals* p, u32 parity) {
  while (p->ended % 2 == (int)parity) {
    int bytes = 0;
    for (const Copy& one : p->copies) bytes += one.bytes;
    if (!bytes || bytes != p->bytes || p->arrived != p->members) {
      take_turns();
      continue;
    }
    for (const Copy& one : p->copies) std::memcpy(one.to, one.from, one.bytes);
    p->copies.clear();
    p->bytes = p->arrived = 0, p->ended++;
    progress = true;
  }
}

static inline u32 float_bits(float x);
struct Half;
struct Bfloat16;
struct Float8;

template <class T>
static u32 round_16(float x);

template <>
u32 round_16<Half>(float x) {
  return float_to_half(x);
}

template <>
u32 round_16<Bfloat16>(float x) {
  return float_to_bfloat16(x);
}

template <class T>
static u32 pack(float first, float second) {
  return round_16<T>(first) | round_16<T>(second) << 16;
}

// E4M3: 3 bits of mantissa, exponents from -6 on, of which the lowest is that of subnormal numbers.
static u32 float_to_e4m3(float x) {
  u32 sign = float_bits(x) >> 24 & 0x80;
  float magnitude = std::fabs(x);
  if (!(magnitude <= 448)) return sign | (magnitude > 448 ? 0x7e : 0x7f);
  int exponent = magnitude < 0x1p-6f ? -6 : std::ilogb(magnitude);
  int eighths = (int)std::nearbyint(std::ldexp(magnitude, 3 - exponent));  // 16: the next exponent
  return sign | ((exponent + 6) * 8 + eighths);
}

template <>
u32 pack<Float8>(float first, float second) {
  return float_to_e4m3(first) | float_to_e4m3(second) << 8;
}

template <class T>
static double number(const u32* words, int i);

template <>
double number<Half>(const u32* words, int i) {
  return half_to_float(words[i / 2] >> (16 * (i % 2)) & 0xffff);
}

// XLA's threads flush subnormal numbers to zero, GPUs do not.
template <>
double number<Bfloat16>(const u32* words, int i) {
  u32 bits = words[i / 2] >> (16 * (i % 2)) & 0xffff;
  return bits & 0x7f80 ? bits_float(bits << 16) : std::ldexp(bits & 0x8000 ? -1.0 : 1.0, -133) * (bits & 0x7f);
}

// Rounded once more, to fewer bits, it is what `x` would be: the last bit tells that some were lost.
static float rounded_to_odd(double x) {
  float y = (float)x;
  if (y == x) return y;
  u32 bits = float_bits(std::fabs((double)y) > std::fabs(x) ? std::nextafter(y, 0.0f) : y) | 1;
  return bits_float(bits);
}

template <class T>
static u32 multiply_add_pairs(u32 a, u32 b, u32 c) {  // exact in double precision
  float y[2];
  for (int i = 0; i < 2; i++) {
    y[i] = rounded_to_odd(number<T>(&a, i) * number<T>(&b, i) + number<T>(&c, i));
  }
  return pack<T>(y[0], y[1]);
}

static const void* rows_of_matrices[1024];

static inline void load_matrices(u32* y, SharedAddress row) {
  int thread = threadIdx.x, warp = thread / 32 * 32;
  rows_of_matrices[thread] = row;
  wait_for_warp();
  for (int i = 0; i < 4; i++) {
    const char* from = (const char*)rows_of_matrices[warp + 8 * i + thread % 32 / 4];
    std::memcpy(y + i, from + 4 * (thread % 4), 4);
  }
  wait_for_warp();
}

static inline void load_transposed(u32* y, SharedAddress row) {
  int thread = threadIdx.x, warp = thread / 32 * 32;
  rows_of_matrices[thread] = row;
  wait_for_warp();
  for (int i = 0; i < 4; i++) {
    u16 pair[2];
    for (int j = 0; j < 2; j++) {
      const u16* from = (const u16*)rows_of_matrices[warp + 8 * i + 2 * (thread % 4) + j];
      pair[j] = from[thread % 32 / 4];
    }
    y[i] = pair[0] | (u32)pair[1] << 16;
  }
  wait_for_warp();
}

template <class T>
static void multiply_add(float* y, const u32* a, const u32* b) {
  int thread = threadIdx.x, warp = thread / 32 * 32, member = thread % 4;
  for (int i = 0; i < 4; i++) exchanged[thread][i] = a[i];
  for (int i = 0; i < 2; i++) exchanged[thread][4 + i] = b[i];
  wait_for_warp();
  for (int i = 0; i < 4; i++) {
    int row = warp + thread % 32 / 4 * 4, column = warp + (2 * member + i % 2) * 4;
    for (int k = 0; k < 16; k++) {
      int other = k % 8 / 2;
      const u32 *of_row = exchanged[row + other], *of_column = exchanged[column + other];
      y[i] += number<T>(of_row + k / 8 * 2 + i / 2, k % 2) * number<T>(of_column + 4 + k / 8, k % 2);
    }
  }
  wait_for_warp();
}

static inline void begin_products() {}
static inline void end_products() {}
template <int NEWEST>
static void wait_for_products() {}

static inline unsigned long long columns_at(const void* p) { return (unsigned long long)p; }
static inline unsigned long long columns_after(unsigned long long columns, int bytes) {
  return columns + bytes;
}

// As `multiply_add`, for COLUMNS columns in shared memory. Bits 4 to 6 of an address are swizzled by
// the three above them.
template <class T, int COLUMNS>
static void multiply_add_columns(float* y, const u32* a, unsigned long long columns) {
  int thread = threadIdx.x, warp = thread / 32 * 32, member = thread % 4;
  for (int i = 0; i < 4; i++) exchanged[thread][i] = a[i];
  wait_for_warp();
  for (int i = 0; i < COLUMNS / 2; i++) {
    int row = warp + thread % 32 / 4 * 4, column = i / 4 * 8 + 2 * member + i % 2;
    for (int k = 0; k < 16; k++) {
      unsigned long long at = columns + 128 * column + 2 * k;
      at ^= (at >> 7 & 7) << 4;
      u16 bits;
      std::memcpy(&bits, (const void*)at, sizeof bits);
      u32 word = bits;
      y[i] += number<T>(exchanged[row + k % 8 / 2] + k / 8 * 2 + i / 2 % 2, k % 2) * number<T>(&word, 0);
    }
  }
  wait_for_warp();
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

static inline float power_of_two(float x) { return std::exp2(x); }

template <class... A, std::size_t... I>
static void call(void (*kernel)(A...), void** pointers, std::index_sequence<I...>) {
  kernel((A)pointers[I]...);
}

template <class... A>
static void launch(void (*kernel)(A...), void** pointers, const int* grid, int threads) {
  static void (*called)(A...);
  static void** given;
  called = kernel, given = pointers;
  gridDim = {grid[0], grid[1], grid[2]};
  threads_of_block.resize(threads);
  for (auto& one : threads_of_block) one.stack.reset(new char[STACK_BYTES]);
  for (int i = 0; i < grid[0] * grid[1] * grid[2]; i++) {
    blockIdx = {i % grid[0], i / grid[0] % grid[1], i / grid[0] / grid[1]};
    block = {threads};
    warps.assign((threads + 31) / 32, Barrier{threads < 32 ? threads : 32});
    for (auto& groups : groups_of_threads) groups.clear();
    for (auto& one : threads_of_block) {
      getcontext(&one.context);
      one.context.uc_stack.ss_sp = one.stack.get();
      one.context.uc_stack.ss_size = STACK_BYTES;
      one.context.uc_link = nullptr;
      one.started = one.done = false;
      makecontext(
          &one.context,
          (void (*)()) + [] {
            call(called, given, std::index_sequence_for<A...>());
            threads_of_block[threadIdx.x].done = progress = true;
            std::longjmp(scheduler, 1);
          },
          0);
    }
    for (bool running = true; running;) {
      running = progress = false;
      for (int thread = 0; thread < threads; thread++) {
        if (threads_of_block[thread].done) continue;
        run_thread(thread);
        running = true;
      }
      if (running && !progress) {
        std::fprintf(stderr, "threads wait for others that have ended\n");
        std::abort();
      }
    }
  }
}
