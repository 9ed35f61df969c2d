// Groups PAIRS of a token and one of its TOP_K experts by expert: up to ROWS pairs to a group.
//
// A block has one of the HELD experts of this device, or the pairs of all others; a thread has
// OF_THREAD neighboring pairs. All blocks count the pairs of all experts, which spares them a launch.

constexpr int OF_THREAD = (PAIRS + THREADS - 1) / THREADS;

struct Pairs {
  const int* experts;  // [PAIRS]
  const int* held;     // of each expert: its index among those that are held, or HELD
};

struct Groups {
  int *matrix, *start, *stop;  // [GROUPS]
  int *tokens, *pairs;         // [GROUPS, ROWS]: rows of the input, and of the sorted pairs
  int* count;                  // of groups
  int* place;                  // [PAIRS]: among the sorted pairs; PAIRS: of another device
  int* expert;                 // [PAIRS]: of each sorted pair
};

__device__ inline int sum_of_warp(int x) {
  for (int d = 16; d; d /= 2) x += exchange(x, d);
  return x;
}

__device__ inline void sort_pairs(const Pairs& pairs, const Groups& groups) {
  __shared__ int counts[HELD + 1], before[THREADS], first_pair, first_group, all_groups;
  int own = blockIdx.x, thread = threadIdx.x;
  for (int i = thread; i <= HELD; i += THREADS) counts[i] = 0;
  __syncthreads();
  int mine = 0;
  for (int i = thread * OF_THREAD; i < (thread + 1) * OF_THREAD && i < PAIRS; i++) {
    int expert = pairs.held[pairs.experts[i]];
    add_to_shared(counts + expert, 1);
    mine += expert == own;
  }
  before[thread] = mine;
  __syncthreads();
  if (thread < 32) {
    int pairs_before = 0, groups_before = 0, all = 0;
    for (int i = thread; i < HELD; i += 32) {
      int count = (counts[i] + ROWS - 1) / ROWS;
      pairs_before += i < own ? counts[i] : 0;
      groups_before += i < own ? count : 0;
      all += count;
    }
    pairs_before = sum_of_warp(pairs_before), groups_before = sum_of_warp(groups_before);
    all = sum_of_warp(all);
    if (thread == 0) first_pair = pairs_before, first_group = groups_before, all_groups = all;
  }
  // Of the threads before: each round adds what twice as many have.
  for (int d = 1; d < THREADS; d *= 2) {
    int more = thread >= d ? before[thread - d] : 0;
    __syncthreads();
    before[thread] += more;
    __syncthreads();
  }
  int rank = before[thread] - mine;
  for (int i = thread * OF_THREAD; i < (thread + 1) * OF_THREAD && i < PAIRS; i++) {
    if (pairs.held[pairs.experts[i]] != own) continue;
    groups.place[i] = own < HELD ? first_pair + rank : PAIRS;
    if (own < HELD) {
      groups.expert[first_pair + rank] = own;
      groups.tokens[first_group * ROWS + rank] = i / TOP_K;
    }
    rank++;
  }
  if (own == HELD) return;
  int of_own = (counts[own] + ROWS - 1) / ROWS, first = first_group * ROWS;
  for (int i = thread; i < of_own; i += THREADS) {
    groups.matrix[first_group + i] = own;
    groups.start[first_group + i] = first_pair + i * ROWS;
    groups.stop[first_group + i] = first_pair + counts[own];
  }
  // Padding repeats rows of the group: one row for all would be read by all blocks at once.
  __syncthreads();
  for (int i = thread; i < of_own * ROWS; i += THREADS) {
    int pair = i % counts[own];
    groups.pairs[first + i] = first_pair + pair;
    if (i >= counts[own]) groups.tokens[first + i] = groups.tokens[first + pair];
  }
  if (own == 0 && thread == 0) *groups.count = all_groups;
}
