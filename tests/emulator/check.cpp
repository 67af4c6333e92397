// The persistent and stepwise kernels of one cell and type without torch, against plain loops in
// double. ThreadSanitizer runs this program, and mutation tests make it fail.
//
//   check [seeds [an algorithm to leave out]]
//
// Built with -DFUSEDRNN_CELL=Lstm|Gru -DFUSEDRNN_OPERAND=float|BFloat16|Float16. Every buffer ends
// at a page that can't be touched.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "persistent_kernels.cuh"

using namespace fusedrnn;
using namespace fusedrnn::cuda;
using Cell = scalar::FUSEDRNN_CELL;
using Element = FUSEDRNN_OPERAND;
constexpr int G = Cell::kGates, A = Cell::kSaved, S = Cell::kPreacts;

namespace {

// ---- buffers ------------------------------------------------------------------------------------

/// Memory that ends with a page. Never freed: a late access must fault too.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size, T value = T{}) : size_(size_t(size)) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), bytes = size_ * sizeof(T);
    const size_t pages = (bytes + page - 1) / page * page;
    auto* base = static_cast<unsigned char*>(
        mmap(nullptr, pages + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (pages && mprotect(base, pages, PROT_READ | PROT_WRITE)) std::abort();
    data_ = reinterpret_cast<T*>(base + pages - bytes);
    std::fill_n(data_, size_, value);
  }
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return int64_t(size_); }

 private:
  size_t size_;
  T* data_;
};

using Doubles = std::vector<double>;

double rounded(double x) {
  Element e;
  round_to(e, float(x));
  return value_of(e);
}
/// Poison for results.
Element element_nan() {
  Element e;
  round_to(e, std::nanf(""));
  return e;
}
double dot(const Element* w, int64_t stride, const double* x, int64_t n) {
  double sum = 0;
  for (int64_t k = 0; k < n; ++k) sum += double(value_of(w[k * stride])) * x[k];
  return sum;
}

// ---- a problem ----------------------------------------------------------------------------------

struct Case {
  Algorithm algorithm;
  Precision precision;
  int T, B, H, D;
  const char* layout;  ///< padded, packed or lengths
  int multiprocessors;
  bool has_nan = false;  ///< in row 0's inputs, with all bits set
};

/// A case's sequences and the order of their steps.
struct Batch {
  std::vector<int64_t> row_lengths, offsets;  ///< [B], [T + 1]
  bool packed;
  int64_t tokens;

  Batch(const Case& c, std::mt19937& random) : row_lengths(size_t(c.B), c.T) {
    packed = std::string(c.layout) == "packed";
    if (std::string(c.layout) != "padded") {
      for (auto& l : row_lengths) l = int64_t(random() % unsigned(c.T + !packed)) + packed;
    }
    if (packed) {
      std::sort(row_lengths.rbegin(), row_lengths.rend());
      row_lengths[0] = c.T;
    }
    offsets.push_back(0);
    for (int t = 0; t < c.T; ++t) {
      const auto size =
          std::count_if(row_lengths.begin(), row_lengths.end(), [&](int64_t l) { return l > t; });
      offsets.push_back(packed ? offsets.back() + size : int64_t(t + 1) * c.B);
    }
    tokens = offsets.back();
  }
  int64_t token(int64_t t, int64_t b) const { return offsets[size_t(t)] + b; }
  int64_t rows(int64_t t) const { return offsets[size_t(t) + 1] - offsets[size_t(t)]; }
  /// The times of a row's steps in direction d's order.
  std::vector<int64_t> times(int64_t b, int64_t d) const {
    std::vector<int64_t> times;
    for (int64_t t = 0; t < row_lengths[size_t(b)]; ++t) times.push_back(t);
    if (d == 1) std::reverse(times.begin(), times.end());
    return times;
  }
};

struct Problem {
  const Case& c;
  std::mt19937 random;
  Batch batch;
  int64_t T, B, H, D, N;
  Buffer<int64_t> lengths, step_offset;
  Buffer<Element> weight;  ///< [D, G*H, H]
  /// [D, G*H]. bias_ih has one element more, so that it is not aligned to more than an element.
  Buffer<Element> bias_ih, bias_hh;
  Buffer<float> x_product;   ///< [D, N, G*H]
  Buffer<float> h0, c0;      ///< [D, B, H]
  Buffer<float> dy;          ///< [N, D, H]
  Buffer<float> dh_n, dc_n;  ///< [D, B, H]

  Problem(const Case& c, unsigned seed)
      : c(c),
        random(seed),
        batch(c, random),
        T(c.T),
        B(c.B),
        H(c.H),
        D(c.D),
        N(batch.tokens),
        lengths(B),
        step_offset(T + 1),
        weight(values<Element>(D * G * H * H, 1.5f / std::sqrt(float(H)))),
        bias_ih(values<Element>(D * G * H + 1)),
        bias_hh(values<Element>(D * G * H)),
        x_product(values<float>(D * N * G * H)),
        h0(values<float>(D * B * H)),
        c0(values<float>(D * B * H)),
        dy(values<float>(N * D * H)),
        dh_n(values<float>(D * B * H)),
        dc_n(values<float>(D * B * H)) {
    std::copy(batch.row_lengths.begin(), batch.row_lengths.end(), lengths.data());
    std::copy(batch.offsets.begin(), batch.offsets.end(), step_offset.data());
    if (c.has_nan) h0[0] = dy[0] = scalar::bit_cast<float>(~0u);
  }
  template <class V>
  Buffer<V> values(int64_t n, float scale = 1) {
    Buffer<V> v(n);
    for (int64_t i = 0; i < n; ++i) {
      round_to(v[i], float(int(random() % 2001) - 1000) / 1000 * scale);
    }
    return v;
  }
  const Element* weight_of(int64_t d) const { return weight.data() + d * G * H * H; }
  /// Direction d's part of a tensor [D, B, H].
  template <class V>
  V* of_direction(const Buffer<V>& state, int64_t d) const {
    return state.data() + d * B * H;
  }
  /// The state before a direction's first step.
  const Buffer<float>& initial_state() const { return Cell::kHasCellState ? c0 : h0; }
  const int64_t* lengths_or_null() const { return batch.packed ? nullptr : lengths.data(); }
};

// ---- the expected results -----------------------------------------------------------------------

/// Shapes as in params.h. NaN: not checked.
struct Expected {
  Doubles y, h_n, c_n, saved, dgates, h_previous, dh0, dc0;

  explicit Expected(const Problem& p)
      : y(size_t(p.N * p.D * p.H), std::nan("")),
        h_n(size_t(p.D * p.B * p.H), std::nan("")),
        c_n(h_n),
        saved(size_t(p.D * p.N * A * p.H), std::nan("")),
        dgates(size_t(p.D * p.N * S * p.H), std::nan("")),
        h_previous(size_t(p.D * p.N * p.H), std::nan("")),
        dh0(h_n),
        dc0(h_n) {
    for (int64_t d = 0; d < p.D; ++d) {
      for (int64_t b = 0; b < p.B; ++b) {
        forward(p, d, b);
        backward(p, d, b);
      }
    }
  }

 private:
  /// A tensor's vector [H] for row b in direction d.
  static Doubles row(const Problem& p, const Buffer<float>& state, int64_t d, int64_t b) {
    const float* const begin = p.of_direction(state, d) + b * p.H;
    return Doubles(begin, begin + p.H);
  }

  void forward(const Problem& p, int64_t d, int64_t b) {
    const int64_t H = p.H;
    Doubles h = row(p, p.h0, d, b), state = row(p, p.initial_state(), d, b);
    for (const int64_t t : p.batch.times(b, d)) {
      const int64_t token = p.batch.token(t, b), at = d * p.N + token;
      Doubles operand(h.size()), next(h.size());
      std::transform(h.begin(), h.end(), operand.begin(), rounded);
      for (int64_t u = 0; u < H; ++u) {
        double preact[S] = {}, of_unit[A];
        for (int g = 0; g < G; ++g) {
          const int64_t i = g * H + u;
          preact[Cell::input_preact[g]] +=
              p.x_product[at * G * H + i] + value_of(p.bias_ih[d * G * H + i]);
          preact[Cell::hidden_preact[g]] += dot(p.weight_of(d) + i * H, 1, operand.data(), H) +
                                            value_of(p.bias_hh[d * G * H + i]);
        }
        next[size_t(u)] = Cell::forward(preact, state[size_t(u)], of_unit);
        for (int a = 0; a < A; ++a) saved[size_t((at * A + a) * H + u)] = of_unit[a];
        y[size_t((token * p.D + d) * H + u)] = next[size_t(u)];
        h_previous[size_t(at * H + u)] = operand[size_t(u)];
      }
      h = next;
    }
    std::copy(h.begin(), h.end(), h_n.begin() + (d * p.B + b) * H);
    std::copy(state.begin(), state.end(), c_n.begin() + (d * p.B + b) * H);
  }

  void backward(const Problem& p, int64_t d, int64_t b) {
    const int64_t H = p.H, first = (d * p.B + b) * H;
    const std::vector<int64_t> times = p.batch.times(b, d);
    Doubles dh = row(p, p.dh_n, d, b), dstate(dh.size());
    if (Cell::kHasCellState) dstate = row(p, p.dc_n, d, b);
    for (size_t i = times.size(); i-- > 0;) {
      const int64_t token = p.batch.token(times[i], b), at = d * p.N + token;
      const int64_t previous = i ? d * p.N + p.batch.token(times[i - 1], b) : -1;
      Doubles dhidden(size_t(G * H));
      for (int64_t u = 0; u < H; ++u) {
        double of_unit[A], dgate[S];
        for (int a = 0; a < A; ++a) of_unit[a] = saved[size_t((at * A + a) * H + u)];
        const double state = previous >= 0
                                 ? saved[size_t((previous * A + Cell::kSavedState) * H + u)]
                                 : p.initial_state()[first + u];
        Cell::backward(of_unit, state, dh[size_t(u)] + p.dy[(token * p.D + d) * H + u],
                       dstate[size_t(u)], dgate);
        for (int s = 0; s < S; ++s) dgates[size_t((at * S + s) * H + u)] = dgate[s];
        for (int g = 0; g < G; ++g) {
          dhidden[size_t(g * H + u)] = rounded(dgate[Cell::hidden_preact[g]]);
        }
      }
      for (int64_t u = 0; u < H; ++u) {
        dh[size_t(u)] = dot(p.weight_of(d) + u, H, dhidden.data(), G * H);
      }
    }
    for (int64_t u = 0; u < H; ++u) {
      dh0[size_t(first + u)] = dh[size_t(u)] + (!Cell::kHasCellState ? dstate[size_t(u)] : 0);
      dc0[size_t(first + u)] = dstate[size_t(u)];
    }
  }
};

// ---- the kernels' results -----------------------------------------------------------------------

struct Results {
  Buffer<Element> y, h_n;
  Buffer<float> c_n, saved;
  Buffer<float> expected_saved;  ///< read by the backward pass
  Buffer<Element> dgates, h_previous;
  Buffer<float> dh0, dc0;

  Results(const Problem& p, const Expected& expected)
      : y(p.N * p.D * p.H, element_nan()),
        h_n(p.D * p.B * p.H, element_nan()),
        c_n(p.D * p.B * p.H, std::nanf("")),
        saved(p.D * p.N * A * p.H, std::nanf("")),
        expected_saved(saved.size()),
        dgates(p.D * p.N * S * p.H),
        h_previous(p.D * p.N * p.H, element_nan()),
        dh0(p.D * p.B * p.H, std::nanf("")),
        dc0(p.D * p.B * p.H, std::nanf("")) {
    std::copy(expected.saved.begin(), expected.saved.end(), expected_saved.data());
  }
};

std::string error_of(int status) { return status ? emulator::last_error() : ""; }

PersistentParams common_params(const Problem& p, const LaunchPlan& plan) {
  PersistentParams params;
  params.steps = p.c.T;
  params.rows = p.c.B;
  params.hidden_size = p.c.H;
  params.directions = p.c.D;
  params.tile_rows = int(plan.tile_rows);
  params.lengths = p.lengths_or_null();
  params.step_offset = p.batch.packed ? p.step_offset.data() : nullptr;
  return params;
}

/// A direction's memory for the grid's exchange.
uint32_t* new_exchange(const LaunchPlan& plan, int64_t values) {
  const int64_t row_bytes =
      values * plan.max_units * (plan.half_operands ? 2 : int64_t(sizeof(Element)));
  return Buffer<uint32_t>(kExchangeSlots * plan.groups * plan.tile_rows * row_bytes / 4, ~0u)
      .data();
}

PersistentForwardParams<Element> forward_params(const Problem& p, const Results& r,
                                                const LaunchPlan& plan) {
  PersistentForwardParams<Element> params;
  static_cast<PersistentParams&>(params) = common_params(p, plan);
  params.y_stride = p.D * p.H;
  params.h0_stride = params.c0_stride = p.H;
  for (int64_t d = 0; d < p.D; ++d) {
    params.direction[d] = {p.weight_of(d),
                           p.bias_ih.data() + d * G * p.H,
                           p.bias_hh.data() + d * G * p.H,
                           p.x_product.data() + d * p.N * G * p.H,
                           p.of_direction(p.h0, d),
                           p.of_direction(p.c0, d),
                           r.y.data() + d * p.H,
                           p.of_direction(r.h_n, d),
                           p.of_direction(r.c_n, d),
                           r.saved.data() + d * p.N * A * p.H,
                           new_exchange(plan, 1)};
  }
  return params;
}

PersistentBackwardParams<Element> backward_params(const Problem& p, const Results& r,
                                                  const LaunchPlan& plan) {
  PersistentBackwardParams<Element> params;
  static_cast<PersistentParams&>(params) = common_params(p, plan);
  params.dy_stride = p.D * p.H;
  params.h0_stride = params.c0_stride = p.H;
  for (int64_t d = 0; d < p.D; ++d) {
    params.direction[d] = {p.weight_of(d),
                           r.expected_saved.data() + d * p.N * A * p.H,
                           p.of_direction(p.h0, d),
                           p.of_direction(p.c0, d),
                           p.dy.data() + d * p.H,
                           p.of_direction(p.dh_n, d),
                           Cell::kHasCellState ? p.of_direction(p.dc_n, d) : nullptr,
                           r.dgates.data() + d * p.N * S * p.H,
                           r.h_previous.data() + d * p.N * p.H,
                           p.of_direction(r.dh0, d),
                           p.of_direction(r.dc0, d),
                           new_exchange(plan, G)};
  }
  return params;
}

std::string run_persistent(const Problem& p, const Results& r) {
  // This cell's kernels alone: fewer to compile.
  const auto& kernels = persistent_kernels_of<Element>(0, scalar::CellList<Cell>());
  PlanProblem problem;
  problem.steps = p.T;
  problem.rows = p.B;
  problem.hidden_size = p.H;
  problem.directions = p.D;
  problem.is_bounded = Cell::kIsBounded && !p.c.has_nan;
  problem.precision = p.c.precision;
  problem.multiprocessors = p.c.multiprocessors;
  problem.requested = p.c.algorithm;
  const LaunchPlan forward = plan_forward(problem, &kernels);
  const LaunchPlan backward = plan_backward(problem, &kernels);
  int status = kernels.forward(forward_params(p, r, forward), forward, nullptr);
  if (!status) status = kernels.backward(backward_params(p, r, backward), backward, nullptr);
  return error_of(status);
}

/// The stepwise kernels of one direction, with GEMMs in plain loops between them.
class Stepwise {
 public:
  Stepwise(const Problem& p, const Results& r, int64_t d)
      : p_(p), r_(r), d_(d), h_(p.B * p.H), state_(p.B * p.H), dh_(p.B * p.H) {}

  int run() {
    int status = 0;
    const int64_t size = p_.B * p_.H, first = d_ * size;
    for (int64_t i = 0; i < size; ++i) {
      round_to(h_[i], p_.h0[first + i]);
      state_[i] = p_.initial_state()[first + i];
    }
    for (int64_t i = 0; i < p_.T && !status; ++i) status = forward(i);
    for (int64_t i = 0; i < size; ++i) {
      r_.h_n[first + i] = h_[i];
      r_.c_n[first + i] = state_[i];
      dh_[i] = p_.dh_n[first + i];
      state_[i] = Cell::kHasCellState ? p_.dc_n[first + i] : 0;
    }
    Buffer<float> product(size);
    for (int64_t i = p_.T - 1; i >= 0 && !status; --i) status = backward(i, product);
    for (int64_t i = 0; i < size; ++i) {
      r_.dh0[first + i] = dh_[i] + product[i] + (!Cell::kHasCellState ? state_[i] : 0);
      r_.dc0[first + i] = state_[i];
    }
    return status;
  }

 private:
  int64_t time(int64_t i) const { return i < 0 ? -1 : d_ ? p_.T - 1 - i : i; }
  /// Row 0's token, in tensors of all directions.
  int64_t token(int64_t t) const { return d_ * p_.N + p_.batch.token(t, 0); }
  StepRows rows(int64_t t) const { return {p_.batch.rows(t), t, p_.lengths_or_null()}; }

  /// product [rows, n] = operands [rows, k] w^T, w [n, k] with these strides.
  static void multiply(const Buffer<float>& product, const Buffer<Element>& operands,
                       const Element* w, int64_t rows, int64_t n, int64_t k, int64_t n_stride,
                       int64_t k_stride) {
    for (int64_t row = 0; row < rows; ++row) {
      Doubles operand(static_cast<size_t>(k));
      for (int64_t j = 0; j < k; ++j) operand[size_t(j)] = value_of(operands[row * k + j]);
      for (int64_t i = 0; i < n; ++i) {
        product[row * n + i] = float(dot(w + i * n_stride, k_stride, operand.data(), k));
      }
    }
  }

  int forward(int64_t i) {
    const int64_t H = p_.H, t = time(i);
    ForwardStepParams<Element> s;
    static_cast<StepRows&>(s) = rows(t);
    const Buffer<float> h_product(p_.B * G * H);
    multiply(h_product, h_, p_.weight_of(d_), s.rows, G * H, H, H, 1);
    s.hidden_size = H;
    s.x_product = p_.x_product.data() + token(t) * G * H;
    s.h_product = h_product.data();
    s.bias_ih = p_.bias_ih.data() + d_ * G * H;
    s.bias_hh = p_.bias_hh.data() + d_ * G * H;
    s.state = state_.data();
    s.h = h_.data();
    s.y = r_.y.data() + (p_.batch.token(t, 0) * p_.D + d_) * H;
    s.y_stride = p_.D * H;
    s.saved = r_.saved.data() + token(t) * A * H;
    return kernels().forward(s, nullptr);
  }

  int backward(int64_t i, const Buffer<float>& product) {
    const int64_t H = p_.H, t = time(i);
    BackwardStepParams<Element> s;
    static_cast<StepRows&>(s) = rows(t);
    s.previous = time(i - 1);
    s.previous_rows = s.previous < 0 ? 0 : p_.batch.rows(s.previous);
    s.dy = p_.dy.data() + (p_.batch.token(t, 0) * p_.D + d_) * H;
    s.dy_stride = p_.D * H;
    s.product = product.data();
    s.dh = dh_.data();
    s.hidden_size = H;
    s.saved = r_.expected_saved.data() + token(t) * A * H;
    s.previous_saved = r_.expected_saved.data() + token(std::max<int64_t>(s.previous, 0)) * A * H;
    s.h0 = p_.of_direction(p_.h0, d_);
    s.c0 = p_.of_direction(p_.c0, d_);
    s.h0_stride = s.c0_stride = H;
    s.dstate = state_.data();
    s.dgates = r_.dgates.data() + token(t) * S * H;
    s.dhidden = dhidden_.data();
    s.h_previous = r_.h_previous.data() + token(t) * H;
    const int status = kernels().backward(s, nullptr);
    multiply(product, dhidden_, p_.weight_of(d_), s.rows, H, G * H, 1, H);
    return status;
  }

  static const StepKernels<Element>& kernels() {
    return step_kernels<Element>(scalar::Cells::index_of<Cell>());
  }

  const Problem& p_;
  const Results& r_;
  const int64_t d_;
  Buffer<Element> h_;
  Buffer<float> state_, dh_;
  Buffer<Element> dhidden_{p_.B * G * p_.H};
};

std::string run_stepwise(const Problem& p, const Results& r) {
  int status = 0;
  for (int64_t d = 0; d < p.D && !status; ++d) status = Stepwise(p, r, d).run();
  return error_of(status);
}

// ---- comparison ---------------------------------------------------------------------------------

/// The largest error; infinite where a result is NaN.
template <class V>
double largest_error(const Buffer<V>& found, const Doubles& expected) {
  double largest = 0;
  for (int64_t i = 0; i < found.size(); ++i) {
    const double e = expected[size_t(i)];
    if (std::isnan(e)) continue;
    const double error = std::fabs(double(value_of(found[i])) - e);
    largest = std::isnan(error) ? INFINITY : std::max(largest, error);
  }
  return largest;
}

/// About one rounding of the operands.
double unit_of(const Case& c) {
  if (std::is_same_v<Element, BFloat16>) return 8e-3;
  if (std::is_same_v<Element, Float16>) return 1e-3;
  return c.precision == Precision::tf32 && c.algorithm != Algorithm::stepwise ? 1e-3 : 1e-6;
}

/// Runs one case, forward and backward; returns its error, empty if there is none.
std::string run(const Case& c, unsigned seed) {
  emulator::set({seed, c.multiprocessors, c.multiprocessors});
  const Problem p(c, seed);
  const Expected expected(p);
  const Results found(p, expected);
  const std::string failure =
      c.algorithm == Algorithm::stepwise ? run_stepwise(p, found) : run_persistent(p, found);
  if (!failure.empty()) return failure;
  const struct {
    const char* name;
    double error;
  } errors[] = {{"y", largest_error(found.y, expected.y)},
                {"h_n", largest_error(found.h_n, expected.h_n)},
                {"c_n", largest_error(found.c_n, expected.c_n)},
                {"saved", largest_error(found.saved, expected.saved)},
                {"dgates", largest_error(found.dgates, expected.dgates)},
                {"h_previous", largest_error(found.h_previous, expected.h_previous)},
                {"dh0", largest_error(found.dh0, expected.dh0)},
                {"dc0", largest_error(found.dc0, expected.dc0)}};
  for (const auto& [name, error] : errors) {
    if (!(error < 10 * unit_of(c))) {
      return std::string("wrong ") + name + ": error " + std::to_string(error);
    }
  }
  return "";
}

// ---- the program --------------------------------------------------------------------------------

void on_fault(int signal) {
  const std::string_view text = signal == SIGILL ? "FAILED: a misaligned access\n"
                                                 : "FAILED: touched memory outside of a buffer\n";
  const ssize_t written = write(1, text.data(), text.size());
  _exit(written > 0 ? 1 : 2);
}

void catch_faults() {
  // Not on the fiber's stack, whose end may be the fault.
  stack_t stack = {};
  stack.ss_size = 64 * 1024;
  stack.ss_sp = std::malloc(stack.ss_size);
  sigaltstack(&stack, nullptr);
  struct sigaction action = {};
  action.sa_handler = on_fault;
  action.sa_flags = SA_ONSTACK;
  for (const int signal : {SIGSEGV, SIGBUS, SIGILL}) sigaction(signal, &action, nullptr);
}

std::vector<Case> all_cases() {
  constexpr Algorithm step = Algorithm::stepwise, cta = Algorithm::persistent_cta;
  constexpr Algorithm grid = Algorithm::persistent_grid, cluster = Algorithm::persistent_cluster;
  const Precision own = sizeof(Element) == 4 ? Precision::ieee : Precision::tf32;
  constexpr Precision tf32 = Precision::tf32;
  std::vector<Case> cases = {
      {step, own, 3, 5, 7, 2, "padded", 8},
      {step, own, 4, 3, 8, 2, "packed", 8},
      {step, own, 4, 3, 4, 2, "lengths", 8},
      {cta, own, 3, 3, 21, 1, "padded", 8},
      {cta, own, 4, 17, 8, 2, "lengths", 8},
      // Two or three CTAs a group; tiles of 8 rows, and of one chunk or two of 16 rows. With more
      // steps than slots, words are cleared and stored again.
      {grid, own, 23, 3, 21, 2, "padded", 8},
      {grid, own, 12, 20, 18, 1, "packed", 2},
      {grid, own, 4, 20, 18, 1, "lengths", 4},
      {grid, own, 17, 2, 37, 1, "lengths", 3},
      {grid, own, 3, 3, 18, 1, "padded", 2, true},
      // Two or three CTAs a cluster; tiles of two chunks where few clusters find room.
      {cluster, tf32, 3, 3, 21, 2, "padded", 8},
      {cluster, tf32, 5, 20, 40, 1, "packed", 2},
      {cluster, tf32, 4, 12, 70, 2, "lengths", 6},
  };
  if (sizeof(Element) == 4) {
    cases.push_back({cta, tf32, 3, 3, 21, 1, "padded", 8});
    cases.push_back({grid, tf32, 11, 20, 18, 2, "lengths", 4});
    cases.push_back({grid, tf32, 3, 3, 18, 1, "padded", 2, true});
  }
  return cases;
}

}  // namespace

int main(int argc, char** argv) {
  const int seeds = argc > 1 ? std::atoi(argv[1]) : 1;
  const std::string left_out = argc > 2 ? argv[2] : "";
  catch_faults();
  const std::vector<Case> cases = all_cases();
  for (int seed = 0; seed < seeds; ++seed) {
    for (const Case& c : cases) {
      if (name_of(c.algorithm) == left_out) continue;
      const std::string wrong = run(c, unsigned(seed));
      if (wrong.empty()) continue;
      std::printf("FAILED: %s, %s, T %d, B %d, H %d, D %d, seed %d: %s\n", name_of(c.algorithm),
                  c.layout, c.T, c.B, c.H, c.D, seed, wrong.c_str());
      return 1;
    }
  }
  const auto counts = emulator::counts();
  std::printf("%zu cases, %d seeds: %llu launches, %llu CTAs, %llu waits\n", cases.size(), seeds,
              (unsigned long long)counts.launches, (unsigned long long)counts.ctas,
              (unsigned long long)counts.waits);
}
