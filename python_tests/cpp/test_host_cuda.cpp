// The executor of host_cuda.h itself: what each CUDA function gives, what shared memory holds, and
// in which order blocks advance. planted_bugs.cpp has what it must refuse or report.
#include <algorithm>
#include <array>
#include <random>
#include <vector>

#include "check.h"
#include "host_cuda.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;
std::mt19937 source(std::random_device{}());

template <class T>
std::vector<T> random_values(size_t count) {
  std::vector<T> x(count);
  for (T& e : x) e = T(source() % 1000);
  return x;
}

// The results of one warp's shuffles and votes, by lane.
struct WarpResults {
  std::array<double, 32> exact, rotated, exchanged, down, up, sum;
  std::array<unsigned, 32> ballot;
  std::array<int, 32> any, all, any_of_none, all_of_all;
};

__global__ void warp_kernel(const double* x, WarpResults* results) {
  const int lane = threadIdx.x % 32, w = threadIdx.x / 32;
  const double mine = x[threadIdx.x];
  WarpResults& r = results[w];
  r.exact[lane] = __shfl_sync(kAll, mine, 5);
  r.rotated[lane] = __shfl_sync(kAll, mine, lane + 3);
  r.exchanged[lane] = __shfl_xor_sync(kAll, mine, 9);
  r.down[lane] = __shfl_down_sync(kAll, mine, 7);
  r.up[lane] = __shfl_up_sync(kAll, mine, 7);
  r.ballot[lane] = __ballot_sync(kAll, mine > 500);
  r.any[lane] = __any_sync(kAll, mine > 990);
  r.all[lane] = __all_sync(kAll, mine > 10);
  r.any_of_none[lane] = __any_sync(kAll, mine < 0);
  r.all_of_all[lane] = __all_sync(kAll, mine >= 0);
  struct Large {
    double x[8];
  } large, all[32];
  for (int i = 0; i < 8; ++i) large.x[i] = mine * i;
  host_cuda::warp_exchange(large, all);
  double sum = 0;
  for (int i = 0; i < 32; ++i) sum += all[i].x[i % 8];
  r.sum[lane] = sum;
}

void warp_functions() {
  constexpr int kWarps = 3;
  const std::vector<double> x = random_values<double>(32 * kWarps);
  std::vector<WarpResults> results(kWarps);
  EFLAT_LAUNCH(warp_kernel, 1, 32 * kWarps, 0, nullptr, x.data(), results.data());
  for (int w = 0; w < kWarps; ++w) {
    const double* y = x.data() + 32 * w;
    unsigned ballot = 0;
    double sum = 0;
    for (int i = 0; i < 32; ++i) ballot |= unsigned(y[i] > 500) << i;
    for (int i = 0; i < 32; ++i) sum += y[i] * (i % 8);
    for (int i = 0; i < 32; ++i) {
      const WarpResults& r = results[w];
      CHECK(r.exact[i] == y[5], "lane %d", i);
      CHECK(r.rotated[i] == y[(i + 3) % 32], "lane %d", i);
      CHECK(r.exchanged[i] == y[i ^ 9], "lane %d", i);
      CHECK(r.down[i] == y[i + 7 < 32 ? i + 7 : i], "lane %d", i);
      CHECK(r.up[i] == y[i - 7 >= 0 ? i - 7 : i], "lane %d", i);
      CHECK(r.ballot[i] == ballot, "lane %d: %x", i, r.ballot[i]);
      CHECK(r.any[i] == std::any_of(y, y + 32, [](double e) { return e > 990; }), "lane %d", i);
      CHECK(r.all[i] == std::all_of(y, y + 32, [](double e) { return e > 10; }), "lane %d", i);
      CHECK(!r.any_of_none[i] && r.all_of_all[i], "lane %d", i);
      CHECK(r.sum[i] == sum, "lane %d: %g, expected %g", i, r.sum[i], sum);
    }
  }
}

// The plain twin of mma.sync.m8n8k4.f64, out (8, 8) += a (8, 4) b (4, 8), and of a sum of 4.
__global__ void twins_kernel(const double* a, const double* b, double* out, double* sums) {
  struct Fragments {
    double a, b;
  };
  struct Four {
    double x, y, z, w;
  };
  const int lane = threadIdx.x, row = lane / 4, k = lane % 4;
  const host_cuda::WarpValues<Fragments> all({a[row * 4 + k], b[k * 8 + row]});
  for (int half = 0; half < 2; ++half) {
    const int column = 2 * k + half;
    for (int i = 0; i < 4; ++i) out[row * 8 + column] += all[row * 4 + i].a * all[column * 4 + i].b;
  }
  const Four mine = {a[lane], b[lane], 1, double(lane)};
  const host_cuda::WarpValues<Four> values(mine);
  Four sum = {0, 0, 0, 0};
  for (int i = 0; i < 32; ++i) {
    const Four x = values[i];
    sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
  }
  sums[lane] = sum.x + sum.y + sum.z + sum.w;
}

void twins() {
  const std::vector<double> a = random_values<double>(32), b = random_values<double>(32);
  std::vector<double> out(64, 1), sums(32);
  EFLAT_LAUNCH(twins_kernel, 1, 32, 0, nullptr, a.data(), b.data(), out.data(), sums.data());
  double total = 32 + 31 * 16;
  for (int i = 0; i < 32; ++i) total += a[i] + b[i];
  for (int i = 0; i < 64; ++i) {
    double expected = 1;
    for (int k = 0; k < 4; ++k) expected += a[i / 8 * 4 + k] * b[k * 8 + i % 8];
    CHECK(out[i] == expected, "%d: %g, expected %g", i, out[i], expected);
    CHECK(sums[i % 32] == total, "%g, expected %g", sums[i % 32], total);
  }
}

// Threads of a partial warp, of which some end early: their lanes give NaN, and no votes.
__global__ void ended_threads_kernel(double* sums, unsigned* votes) {
  if (threadIdx.x % 4 == 1) return;
  double all[32];
  host_cuda::warp_exchange(double(threadIdx.x), all);
  sums[threadIdx.x] = 0;
  for (double x : all) sums[threadIdx.x] += std::isnan(x) ? 1000 : x;
  votes[threadIdx.x] = __ballot_sync(kAll, 1);
  __syncthreads();
}

void ended_threads() {
  std::vector<double> sums(20, -1);
  std::vector<unsigned> votes(20);
  EFLAT_LAUNCH(ended_threads_kernel, 1, 20, 0, nullptr, sums.data(), votes.data());
  for (int i = 0; i < 20; ++i) {
    const bool ended = i % 4 == 1;
    CHECK(sums[i] == (ended ? -1 : 190 - (1 + 5 + 9 + 13 + 17) + 17 * 1000), "%g", sums[i]);
    CHECK(votes[i] == (ended ? 0 : 0xddddd), "%x", votes[i]);
  }
}

// Shared memory is NaN at first in every block, the static one too; each barrier lets each thread
// see what the others wrote.
__global__ void shared_kernel(const float* x, float* out, int* unwritten, int count) {
  EFLAT_SHARED_DYNAMIC(float, dynamic);
  EFLAT_SHARED_STATIC(float, fixed, 64);
  EFLAT_SHARED_STATIC(double, other, 3);
  const int t = threadIdx.x;
  if (t == 0) {
    bool all = true;
    for (int i = 0; i < count; ++i) all = all && std::isnan(dynamic[i]);
    for (int i = 0; i < 64; ++i) all = all && std::isnan(fixed[i]);
    for (int i = 0; i < 3; ++i) all = all && std::isnan(other[i]);
    unwritten[blockIdx.x] = all;
  }
  __syncthreads();
  dynamic[t] = x[blockIdx.x * 64 + t];
  __syncthreads();
  fixed[t] = dynamic[63 - t];
  if (t == 7) other[2] = dynamic[0];
  __syncthreads();
  out[blockIdx.x * blockDim.x + t] = fixed[(t + 1) % 64] + other[2];
}

void shared_memory() {
  constexpr int kBlocks = 5, kCount = 67;
  const std::vector<float> x = random_values<float>(64 * kBlocks);
  std::vector<float> out(64 * kBlocks, NAN);
  std::vector<int> unwritten(kBlocks);
  EFLAT_LAUNCH(shared_kernel, kBlocks, 64, kCount * sizeof(float), nullptr, x.data(), out.data(),
               unwritten.data(), kCount);
  for (int b = 0; b < kBlocks; ++b) {
    CHECK(unwritten[b], "block %d", b);
    for (int t = 0; t < 64; ++t)
      CHECK(out[64 * b + t] == x[64 * b + 63 - (t + 1) % 64] + x[64 * b], "%d, %d", b, t);
  }
}

template <int kKind>
__global__ void largest_kernel(size_t bytes) {
  EFLAT_SHARED_DYNAMIC(unsigned char, s);
  s[bytes - 1] = kKind;
}

void runtime() {
  int device = -1, value = 0;
  CHECK(cudaGetDevice(&device) == cudaSuccess && device == 0, "%d", device);
  cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device);
  CHECK(value == 2, "%d", value);
  cudaDeviceGetAttribute(&value, cudaDevAttrSingleToDoublePrecisionPerfRatio, device);
  CHECK(value == 2, "%d", value);
  cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  CHECK(value == 101376, "%d", value);
  CHECK(cudaFuncSetAttribute(largest_kernel<1>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             value + 1) == cudaErrorInvalidValue,
        "more than the device has");
  CHECK(cudaFuncSetAttribute(largest_kernel<1>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             value) == cudaSuccess,
        "as much as the device has");
  EFLAT_LAUNCH(largest_kernel<1>, 1, 1, value, nullptr, value);
  cudaFuncAttributes attributes;
  CHECK(cudaFuncGetAttributes(&attributes, largest_kernel<2>) == cudaSuccess &&
            attributes.maxThreadsPerBlock == 1024,
        "%d", attributes.maxThreadsPerBlock);
  std::vector<int> x = random_values<int>(9), y(9, -1);
  cudaMemcpyAsync(y.data(), x.data(), 9 * sizeof(int), cudaMemcpyHostToDevice, nullptr);
  CHECK(x == y, "copied");
  cudaMemsetAsync(y.data(), 0, 8 * sizeof(int), nullptr);
  for (int i = 0; i < 9; ++i) CHECK(y[i] == (i < 8 ? 0 : x[8]), "set at %d", i);
  CHECK(cudaGetLastError() == cudaSuccess, "no error");
}

void vectors() {
  static_assert(alignof(float4) == 16 && alignof(double2) == 16 && alignof(uint4) == 16);
  static_assert(alignof(float2) == 8 && alignof(uint2) == 8 && alignof(int4) == 16);
  alignas(16) const float x[4] = {1, 2, 3, 4};
  const float4 v = __ldg(reinterpret_cast<const float4*>(x));
  CHECK(v.x == 1 && v.y == 2 && v.z == 3 && v.w == 4, "%g", v.x);
  CHECK(make_double2(1, 2).y == 2 && make_uint4(1, 2, 3, 4).z == 3, "made");
}

template <class T>
__global__ void atomics_kernel(const T* x, T* total, T* last, int* larger) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(total, x[i]);
  atomicExch(last, x[i]);
  atomicMax(larger, int(x[i]));
}

template <class T>
void atomics() {
  for (int resident : {1, 3}) {
    host_cuda::set_schedule(resident, source());
    const std::vector<T> x = random_values<T>(4 * 40);
    T total = 0, last = T(-1), expected = 0;
    int larger = -1;
    EFLAT_LAUNCH(atomics_kernel<T>, 4, 40, 0, nullptr, x.data(), &total, &last, &larger);
    for (T e : x) expected += e;
    CHECK(total == expected, "%g, expected %g", double(total), double(expected));
    CHECK(std::count(x.begin(), x.end(), last) > 0, "%g", double(last));
    CHECK(larger == int(*std::max_element(x.begin(), x.end())), "%d", larger);
  }
}

// Every block writes; the last to arrive sums. order[i]: the block that came as the i-th.
__global__ void last_block_kernel(const double* x, double* partial, unsigned* arrived, double* sum,
                                  unsigned* order) {
  EFLAT_SHARED_STATIC(unsigned, ticket, 1);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  for (int round = 0; round < 4; ++round) {
    partial[i] = round < 3 ? NAN : 2 * x[i];
    __syncthreads();
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *ticket = atomicAdd(arrived, 1u);
    order[*ticket] = blockIdx.x;
  }
  __syncthreads();
  if (*ticket != gridDim.x - 1 || threadIdx.x != 0) return;
  __threadfence();
  for (unsigned k = 0; k < gridDim.x * blockDim.x; ++k) *sum += partial[k];
}

// Every block waits for the one before, passed on by a flag.
__global__ void chain_kernel(const double* x, double* sums, int* flags) {
  const unsigned b = blockIdx.x;
  if (threadIdx.x == 0 && b > 0)
    while (host_cuda::load_acquire(flags + b - 1) == 0) __nanosleep(100);
  __syncthreads();
  const unsigned i = b * blockDim.x + threadIdx.x;
  sums[i] = x[i] + (b > 0 ? sums[i - blockDim.x] : 0);
  __syncthreads();
  if (threadIdx.x == 0) host_cuda::store_release(flags + b, 1);
}

void blocks_together() {
  constexpr int kBlocks = 9, kThreads = 33;
  const std::vector<double> x = random_values<double>(kBlocks * kThreads);
  bool other_order = false;
  for (int resident : {1, 2, 4}) {
    for (int repeat = 0; repeat < 3; ++repeat) {
      host_cuda::set_schedule(resident, source());
      std::vector<double> partial(x.size(), NAN);
      std::vector<unsigned> order(kBlocks, 99);
      unsigned arrived = 0;
      double sum = 0, expected = 0;
      EFLAT_LAUNCH(last_block_kernel, kBlocks, kThreads, 0, nullptr, x.data(), partial.data(),
                   &arrived, &sum, order.data());
      for (double e : x) expected += 2 * e;
      CHECK(sum == expected, "%d resident: %g, expected %g", resident, sum, expected);
      const bool sorted = std::is_sorted(order.begin(), order.end());
      CHECK(resident > 1 || sorted, "one block runs at a time, in order");
      other_order = other_order || !sorted;

      std::vector<double> sums(x.size(), NAN);
      std::vector<int> flags(kBlocks, 0);
      EFLAT_LAUNCH(chain_kernel, kBlocks, kThreads, 0, nullptr, x.data(), sums.data(),
                   flags.data());
      for (int t = 0; t < kThreads; ++t) {
        double total = 0;
        for (int b = 0; b < kBlocks; ++b) total += x[b * kThreads + t];
        CHECK(sums[(kBlocks - 1) * kThreads + t] == total, "%d resident, thread %d", resident, t);
      }
    }
  }
  CHECK(other_order, "resident blocks always came in order");
}

// Block 0 waits for block 1, which has to be resident, too.
__global__ void wait_for_next_kernel(int* flags) {
  if (blockIdx.x == 0 && threadIdx.x == 5)
    while (atomicAdd(flags, 0) == 0) __nanosleep(100);
  if (blockIdx.x == 1 && threadIdx.x == 6) atomicAdd(flags, 1);
  __syncthreads();
}

void same_seed_same_order() {
  const auto run = [](unsigned seed) {
    host_cuda::set_schedule(4, seed);
    const std::vector<double> x = random_values<double>(64 * 8);
    std::vector<double> partial(x.size());
    std::vector<unsigned> order(64);
    unsigned arrived = 0;
    double sum = 0;
    EFLAT_LAUNCH(last_block_kernel, 64, 8, 0, nullptr, x.data(), partial.data(), &arrived, &sum,
                 order.data());
    return order;
  };
  const unsigned seed = source();
  CHECK(run(seed) == run(seed), "seed %u", seed);
  CHECK(run(seed) != run(seed + 1), "seed %u", seed);
}

}  // namespace

int main() {
  for (int resident : {1, 3}) {
    host_cuda::set_schedule(resident, source());
    warp_functions();
    twins();
    ended_threads();
    shared_memory();
  }
  runtime();
  vectors();
  atomics<int>();
  atomics<unsigned>();
  atomics<unsigned long long>();
  atomics<float>();
  atomics<double>();
  blocks_together();
  same_seed_same_order();
  host_cuda::set_schedule(2, source());
  int flag = 0;
  EFLAT_LAUNCH(wait_for_next_kernel, 2, 32, 0, nullptr, &flag);
  std::puts("host_cuda: 1 passed, 0 failed");
}
