// The CUDA sources themselves, run by host_cuda.h, against the CPU kernels: mixed lists of pairs,
// poisoned workspace and outputs, blocks in order and blocks together.
//   test_cuda         everything
//   test_cuda brief   the least that passes every barrier, for drop_barriers.py
#include <csignal>
#include <string>

#include "../cpu/perturb.h"
#include "../cuda/launch.h"
#include "examples.h"

using namespace eflat;

namespace {

std::mt19937 source(std::random_device{}());

struct Call {
  bool onto_B = true, global_norm = false;
  Update update = {false, 0};
  DType norms_dtype = DType::f64;
};

struct Results {
  std::vector<Values> out;
  Values norms;
  int64_t skipped = 0;
};

void serially(int64_t count, const std::function<void(int64_t)>& body) {
  for (int64_t i = 0; i < count; ++i) body(i);
}

Results start(const std::vector<Example>& examples, const Call& call) {
  Results results{{}, Values(call.norms_dtype, examples.size())};
  for (const Example& x : examples) {
    Values out(x.shape.dtype, x.target_size(call.onto_B));
    for (size_t i = 0; call.update.average && i < out.size(); ++i) out.set(i, 0.01 * double(i % 5));
    results.out.push_back(out);
  }
  return results;
}

Results run(const std::vector<Example>& examples, const Call& call, bool cuda) {
  Results results = start(examples, call);
  std::vector<Pair> pairs;
  for (size_t l = 0; l < examples.size(); ++l)
    pairs.push_back(examples[l].pair(call.onto_B, results.out[l]));
  const Problem problem{pairs.data(),     int(pairs.size()), 0.1,
                        call.global_norm, call.update,       call.norms_dtype};
  if (cuda) {
    const size_t bytes = size_t(cuda::workspace_bytes(problem));
    Values workspace(DType::f64, bytes / sizeof(double) + 1);  // NaN
    CHECK(cuda::perturb(problem, workspace.data(), results.norms.data(), &results.skipped,
                        nullptr) == cudaSuccess,
          "launched");
    CHECK(workspace.guards_intact(), "of %zu bytes of workspace", bytes);
  } else {
    std::vector<double> norms(pairs.size(), NAN);
    results.skipped = cpu::perturb(problem, norms.data(), serially, 1);
    results.norms = Values(call.norms_dtype, norms);
  }
  return results;
}

// Of one pair: what rounding to its type allows, and for float64 what the condition allows.
double tolerance(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return 1e-8;
    case DType::f32:
      return 2e-7;
    case DType::bf16:
      return 1e-2;
    default:
      return 2e-3;
  }
}

bool same(double x, double y, double relative) {
  return std::isnan(y) ? std::isnan(x) : x == y || std::fabs(x - y) <= relative * std::fabs(y);
}

void agrees_with_the_cpu(const std::vector<Example>& examples, const Call& call, int resident = 1) {
  const unsigned seed = source();
  host_cuda::set_schedule(resident, seed);
  const Results expected = run(examples, call, false), given = run(examples, call, true);
  CHECK(given.skipped == expected.skipped, "%d skipped, expected %d", int(given.skipped),
        int(expected.skipped));
  CHECK(given.norms.guards_intact(), "norms");
  for (size_t l = 0; l < examples.size(); ++l) {
    const auto& [n, m, r, dtype, condition_A, condition_B] = examples[l].shape;
    const std::string at = "pair " + std::to_string(l) + " of " + std::to_string(n) + " " +
                           std::to_string(m) + " " + std::to_string(r) + ", type " +
                           std::to_string(int(dtype)) +
                           (call.onto_B ? ", onto B, " : ", onto A, ") + std::to_string(resident) +
                           " blocks, seed " + std::to_string(seed);
    CHECK(same(given.norms[l], expected.norms[l], 1e-6), "%s: norm %g, expected %g", at.c_str(),
          given.norms[l], expected.norms[l]);
    CHECK(given.out[l].guards_intact(), "%s", at.c_str());
    if (!usable(expected.norms[l])) {
      CHECK(given.out[l] == expected.out[l], "%s: a pair to be left alone", at.c_str());
      continue;
    }
    const double error = relative_error(given.out[l].matrix(), expected.out[l].matrix());
    CHECK(error < tolerance(dtype), "%s: off by %g", at.c_str(), error);
  }
}

std::vector<Example> examples_of(const std::vector<Shape>& shapes) {
  std::vector<Example> examples;
  for (const Shape& shape : shapes) examples.emplace_back(shape, source);
  return examples;
}

void mixed_lists() {
  const auto mixed = examples_of({{1, 1, 1, DType::f32},
                                  {5, 4, 2, DType::bf16},
                                  {40, 30, 7, DType::f16},
                                  {33, 600, 16, DType::f32},
                                  {530, 12, 5, DType::f64},
                                  {90, 80, 40, DType::f32}});
  for (bool onto_B : {true, false}) {
    agrees_with_the_cpu(mixed, {onto_B});
    agrees_with_the_cpu(mixed, {onto_B, true, {true, 0.3}, DType::f32}, 3);
  }
}

void ill_conditioned() {
  for (bool onto_B : {true, false}) {
    const auto examples = examples_of({{60, 40, 9, DType::f64, 1e4, 1},
                                       {40, 60, 9, DType::f64, 1e4, 1e4},
                                       {50, 20, 4, DType::f32, 1, 1e3},
                                       {30, 20, 4}});
    agrees_with_the_cpu(examples, {onto_B}, onto_B ? 1 : 3);
  }
}

void bad_values() {
  const Shape shape{30, 20, 4, DType::f32};
  std::vector<Example> examples = examples_of({shape, shape, shape, shape, shape, shape});
  examples[0].B.set(7, NAN);
  examples[1].grad_A.set(3, INFINITY);
  examples[3].grad_A = Values(shape.dtype, Matrix(4 * 20, 0.0));
  examples[3].grad_B = Values(shape.dtype, Matrix(30 * 4, 0.0));
  examples[4].B = Values(shape.dtype, Matrix(30 * 4, 0.0));
  for (bool global_norm : {true, false}) {
    for (bool average : {true, false}) {
      const Call call{!average, global_norm, {average, 0.5}};
      agrees_with_the_cpu(examples, call, average ? 1 : 2);
      const std::vector<Example> good{examples[2], examples[4], examples[5]};
      const Results alone = run(good, call, true), all = run(examples, call, true);
      CHECK(all.out[2] == alone.out[0] && all.out[5] == alone.out[2], "bad pairs left alone");
    }
  }
}

void brief() {
  for (bool onto_B : {true, false}) {
    auto examples = examples_of(
        {{260, 130, 18, DType::f32, 1e4, 1e4}, {40, 300, 12, DType::f32}, {30, 20, 4, DType::f32}});
    examples[2].B = Values(DType::f32, Matrix(30 * 4, 0.0));
    agrees_with_the_cpu(examples, {onto_B}, onto_B ? 3 : 2);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::string(arguments[1]) == "brief") {
    std::signal(SIGABRT, [](int) { std::_Exit(1); });
    brief();
  } else {
    mixed_lists();
    ill_conditioned();
    bad_values();
  }
  std::puts("cuda: 1 passed, 0 failed");
}
