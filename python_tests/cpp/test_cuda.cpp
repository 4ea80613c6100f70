// The CUDA sources themselves, run by host_cuda.h, against the CPU kernels: mixed lists of pairs,
// poisoned workspace and outputs, blocks in order and blocks together.
//   test_cuda         everything
//   test_cuda brief   the least that passes every barrier, for drop_barriers.py
#include <csignal>
#include <optional>
#include <string>

#include "../../csrc/cpu/perturb.h"
#include "../../csrc/cuda/launch.h"
#include "examples.h"

using namespace eflat;

namespace {

std::mt19937 source(std::random_device{}());

using cuda::Arithmetic;

constexpr double kRho = 0.1;
constexpr Onto kAll[] = {Onto::B, Onto::A, Onto::both};

enum class Added { nothing, own, average };  // to the perturbed factors

struct Call {
  Onto onto = Onto::B;
  bool global_norm = false;
  Update update = {false, 0};
  DType norms_dtype = DType::f64;
  bool step = false;
  Arithmetic arithmetic = Arithmetic::native;
  Added added = Added::nothing;
};

struct Results {
  std::vector<Values> out, out_other;  // out_other: onto both
  Values norms;
  std::vector<Values> stepped;  // what the optimizer's step reads or writes
  int64_t skipped = 0;
};

void serially(int64_t count, const std::function<void(int64_t)>& body) {
  for (int64_t i = 0; i < count; ++i) body(i);
}

Values some_values(DType dtype, size_t count, double first) {
  Values values(dtype, count);
  for (size_t i = 0; i < count; ++i) values.set(i, first + 0.01 * double(i % 5));
  return values;
}

Results start(const std::vector<Example>& examples, const Call& call) {
  Results results{{}, {}, Values(call.norms_dtype, examples.size()), {}};
  for (const Example& x : examples) {
    const DType dtype = call.added == Added::average ? added_to(x.shape.dtype) : x.shape.dtype;
    auto out = [&](size_t count) {
      return call.update.average ? some_values(dtype, count, 0) : Values(dtype, count);
    };
    results.out.push_back(out(x.target_size(call.onto)));
    if (call.onto == Onto::both) results.out_other.push_back(out(x.A.size()));
  }
  return results;
}

// The optimizer's steps of `pairs`, whose factors are those of `examples`.
class Steps {
 public:
  Steps(std::vector<Example>& examples, std::vector<Pair>& pairs) {
    memory_.reserve(4 * pairs.size());  // pointers into these stay
    steps_.reserve(2 * pairs.size());
    for (size_t l = 0; l < pairs.size(); ++l) {
      for (Side* side : {&pairs[l].target, &pairs[l].other}) {
        Example& x = examples[l];
        Values& factor = side->factor == x.B.data() ? x.B : x.A;
        steps_.push_back(adamw(factor, side == &pairs[l].target ? 0.1 : 0.2));
        side->step = &steps_.back();
      }
    }
  }

  const std::vector<Values>& memory() const { return memory_; }  // moments

 private:
  void* take(const Values& like, double first) {
    memory_.push_back(some_values(like.dtype(), like.size(), first));
    return memory_.back().data();
  }
  AdamW adamw(Values& factor, double lr) {
    void *exp_avg = take(factor, -0.02), *exp_avg_sq = take(factor, 0.3);
    return {factor.data(), exp_avg, exp_avg_sq, nullptr, 4, lr, 0.9, 0.99, 1e-6, 0.5};
  }

  std::vector<Values> memory_;
  std::vector<AdamW> steps_;
};

// With examples of its own, for a step to change.
Results run(std::vector<Example> examples, const Call& call, bool cuda) {
  Results results = start(examples, call);
  std::vector<Pair> pairs;
  for (size_t l = 0; l < examples.size(); ++l)
    pairs.push_back(examples[l].pair(call.onto, results.out[l],
                                     call.onto == Onto::both ? &results.out_other[l] : nullptr));
  std::vector<Values> added;
  added.reserve(2 * pairs.size());
  for (Pair& p : pairs) {
    for (Side* side : {&p.target, &p.other}) {
      if (!side->out || call.added == Added::nothing) continue;
      added.push_back(some_values(added_to(p.dtype), side->length * p.rank, -0.3));
      side->added = call.added == Added::average ? side->out : added.back().data();
    }
  }
  std::optional<Steps> steps;
  if (call.step) steps.emplace(examples, pairs);
  const Problem problem{pairs.data(),     int(pairs.size()), kRho,
                        call.global_norm, call.update,       call.norms_dtype};
  if (cuda) {
    const size_t bytes = size_t(cuda::workspace_bytes(problem));
    Values workspace(DType::f64, bytes / sizeof(double) + 1);  // NaN
    CHECK(cuda::perturb(problem, workspace.data(), results.norms.data(), &results.skipped, nullptr,
                        call.arithmetic) == cudaSuccess,
          "launched");
    CHECK(workspace.guards_intact(), "of %zu bytes of workspace", bytes);
  } else {
    std::vector<double> norms(pairs.size(), NAN);
    results.skipped = cpu::perturb(problem, norms.data(), serially, 1);
    results.norms = Values(call.norms_dtype, norms);
  }
  if (steps) {
    results.stepped = steps->memory();
    for (const Example& x : examples) results.stepped.insert(results.stepped.end(), {x.A, x.B});
  }
  return results;
}

// The error that rounding allows a pair of this type; for float64 also its condition.
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
                           std::to_string(int(dtype)) + ", " + name_of(call.onto) + ", " +
                           std::to_string(resident) + " blocks, seed " + std::to_string(seed);
    CHECK(same(given.norms[l], expected.norms[l], 1e-6), "%s: norm %g, expected %g", at.c_str(),
          given.norms[l], expected.norms[l]);
    for (bool of_other : {false, true}) {
      if (of_other && call.onto != Onto::both) continue;
      const Values &E = (of_other ? given.out_other : given.out)[l],
                   &expected_E = (of_other ? expected.out_other : expected.out)[l];
      CHECK(E.guards_intact(), "%s", at.c_str());
      if (!usable(expected.norms[l])) {
        CHECK(E == expected_E, "%s: a pair to be left alone", at.c_str());
        continue;
      }
      // Onto both, E of B is what is left of the gradient, perhaps nothing.
      const double least = call.onto == Onto::both ? examples[l].least_size(!of_other, kRho) : 0;
      const double error = relative_error(E.matrix(), expected_E.matrix(), least);
      CHECK(error < tolerance(dtype), "%s: off by %g%s", at.c_str(), error,
            of_other ? ", the other side" : "");
    }
  }
  CHECK(given.stepped.size() == expected.stepped.size(), "steps");
  for (size_t i = 0; i < given.stepped.size(); ++i) {
    const Values &x = given.stepped[i], &y = expected.stepped[i];
    const double error = relative_error(x.matrix(), y.matrix());
    CHECK(x.guards_intact() && error < 3 * tolerance(y.dtype()),
          "%s, %d blocks, seed %u: tensor %zu of the step is off by %g", name_of(call.onto),
          resident, seed, i, error);
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
  for (Onto onto : kAll) {
    agrees_with_the_cpu(mixed, {onto});
    agrees_with_the_cpu(mixed, {onto, true, {true, 0.3}, DType::f32}, 3);
  }
}

// The point that the gradients were taken at, of vectors and of elements, in either arithmetic;
// what was added is also what blocks of other rows write.
void points() {
  const auto examples = examples_of({{40, 30, 7, DType::f16},
                                     {140, 12, 8, DType::f32},
                                     {12, 140, 3, DType::f64},
                                     {36, 60, 16, DType::bf16},
                                     {140, 150, 20, DType::f32, 1e3, 1e3}});
  for (Onto onto : kAll) {
    for (Added added : {Added::own, Added::average}) {
      const Arithmetic arithmetic =
          added == Added::own ? Arithmetic::two_float : Arithmetic::float64;
      const bool global = onto == Onto::A, step = added == Added::average;
      agrees_with_the_cpu(examples,
                          {onto, global, {true, 0.3}, DType::f64, step, arithmetic, added}, 3);
    }
  }
}

// Onto both in either arithmetic; while B and with it the gradient of A are small, B alone.
void onto_both() {
  for (double size_of_B : {1.0, 1e-5}) {
    auto examples = examples_of({{40, 30, 7}, {33, 60, 16, DType::f32}, {50, 20, 4, DType::bf16}});
    for (Example& x : examples)
      for (Values* values : {&x.B, &x.grad_A})
        for (size_t i = 0; i < values->size(); ++i) values->set(i, size_of_B * (*values)[i]);
    for (Arithmetic arithmetic : {Arithmetic::float64, Arithmetic::two_float}) {
      const Call call{Onto::both, false, {}, DType::f64, false, arithmetic};
      agrees_with_the_cpu(examples, call);
      for (const Values& E_A : run(examples, call, true).out_other)
        CHECK((norm_of(E_A.matrix()) == 0) == (size_of_B < 1), "E of A where B is %g", size_of_B);
    }
  }
}

// It may be the E of A that is not finite in its type.
void large_E_of_A() {
  auto examples = examples_of({{1, 20, 1, DType::f16}, {30, 20, 4, DType::f16}});
  examples[0].B.set(0, 1e-7);
  agrees_with_the_cpu(examples, {Onto::both});
  CHECK(run(examples, {Onto::both}, true).skipped == 1, "skipped");
}

void steps() {
  const auto examples = examples_of({{40, 30, 7, DType::f16},
                                     {140, 12, 8, DType::f32},
                                     {12, 140, 3, DType::f64},
                                     {40, 60, 16, DType::bf16}});
  for (Onto onto : kAll)
    agrees_with_the_cpu(examples, {onto, onto == Onto::A, {true, 0.3}, DType::f64, true}, 2);
}

void ill_conditioned() {
  for (Onto onto : kAll) {
    const auto examples = examples_of({{60, 40, 9, DType::f64, 1e4, 1},
                                       {40, 60, 9, DType::f64, 1e4, 1e4},
                                       {50, 20, 4, DType::f32, 1, 1e3},
                                       {30, 20, 4}});
    agrees_with_the_cpu(examples, {onto}, onto == Onto::B ? 1 : 3);
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
  for (Onto onto : kAll) {
    for (bool global_norm : {true, false}) {
      const bool average = global_norm != (onto == Onto::B);
      const Call call{onto, global_norm, {average, 0.5}};
      agrees_with_the_cpu(examples, call, average ? 1 : 2);
      const std::vector<Example> good{examples[2], examples[4], examples[5]};
      const Results alone = run(good, call, true), all = run(examples, call, true);
      CHECK(all.out[2] == alone.out[0] && all.out[5] == alone.out[2], "bad pairs left alone");
      if (onto != Onto::both) continue;
      CHECK(all.out_other[2] == alone.out_other[0] && all.out_other[5] == alone.out_other[2],
            "bad pairs left alone");
    }
  }
}

void brief() {
  for (bool onto_B : {true, false}) {
    auto examples = examples_of(
        {{260, 130, 18, DType::f32, 1e4, 1e4}, {40, 300, 12, DType::f32}, {30, 20, 4, DType::f32}});
    examples[2].B = Values(DType::f32, Matrix(30 * 4, 0.0));
    agrees_with_the_cpu(examples, {onto_B ? Onto::B : Onto::A}, onto_B ? 3 : 2);
  }
  agrees_with_the_cpu(examples_of({{40, 30, 12, DType::f32, 1e4, 1e4}, {30, 20, 9, DType::f32}}),
                      {Onto::both}, 3);
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
    onto_both();
    points();
    large_E_of_A();
    steps();
  }
  std::puts("cuda: 1 passed, 0 failed");
}
