// Gram matrices in pairs of floats, at the length of a large call's blocks: longer than the other
// tests can afford.
#define EFLAT_HOST_CUDA "../../python_tests/cpp/host_cuda.h"
#include <random>
#include <vector>

#include "../../csrc/cuda/reduce.cuh"
#include "check.h"

using namespace eflat;
using namespace eflat::cuda;

namespace {

__global__ void gram_kernel(SideArgs side, Chunk chunk, double* out) {
  EFLAT_SHARED_DYNAMIC(unsigned char, memory);
  reduce<TwoFloat, true>(side, chunk, 0, side.length, 0, memory, out);
}

void gram_of_a_long_block(int r) {
  std::mt19937 source(std::random_device{}());
  std::uniform_real_distribution<float> uniform(1, 2);
  const int rows = 2048;
  std::vector<float> x(rows * r);
  for (float& e : x) e = uniform(source);
  SideArgs side{};
  side.factor = x.data();
  side.length = rows;
  side.dtype = DType::f32;
  side.vectors = true;
  const Chunk chunk(r, r, side.transposed);
  std::vector<double> out(r * r, NAN);
  EFLAT_LAUNCH(gram_kernel, 1, kThreads, stage_doubles(chunk) * sizeof(double), nullptr, side,
               chunk, out.data());
  double largest = 0;  // relative error
  for (int i = 0; i < r; ++i) {
    for (int j = i; j < r; ++j) {
      long double sum = 0;
      for (int k = 0; k < rows; ++k) sum += static_cast<long double>(x[k * r + i]) * x[k * r + j];
      largest = std::fmax(largest, double(std::fabs(out[i * r + j] - sum) / sum));
    }
  }
  CHECK(largest < std::ldexp(1, -40), "rank %d: off by 2^%g", r, std::log2(largest));
}

}  // namespace

int main() {
  gram_of_a_long_block(8);
  gram_of_a_long_block(72);
  std::puts("two_float: 2 passed, 0 failed");
}
