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
  bool hx = true;         ///< false: the initial states are zeros
  bool is_fused = false;  ///< stepwise only: a step's GEMMs are in its kernel
  bool has_nan = false;   ///< in row 0's inputs, with all bits set
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
  int64_t I;                   ///< H
  Buffer<Element> x;           ///< [N, I]
  Buffer<Element> weight_ih;   ///< [D, G*H, I]
  Buffer<float> x_product;     ///< [D, N, G*H]
  Buffer<Element> h0, c0;      ///< [D, B, H]
  Buffer<Element> dy;          ///< [N, D, H]
  Buffer<Element> dh_n, dc_n;  ///< [D, B, H]

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
        I(H),
        x(values<Element>(N * I)),
        weight_ih(values<Element>(D * G * H * I, 1 / std::sqrt(float(I)))),
        x_product(D * N * G * H),
        h0(values<Element>(D * B * H)),
        c0(values<Element>(D * B * H)),
        dy(values<Element>(N * D * H)),
        dh_n(values<Element>(D * B * H)),
        dc_n(values<Element>(D * B * H)) {
    std::copy(batch.row_lengths.begin(), batch.row_lengths.end(), lengths.data());
    std::copy(batch.offsets.begin(), batch.offsets.end(), step_offset.data());
    if (!c.hx) {
      for (const Buffer<Element>& state : {h0, c0}) {
        std::fill_n(state.data(), state.size(), Element{});
      }
    }
    if (c.has_nan) {
      for (Element* p : {&h0[0], &dy[0]}) std::memset(p, 0xff, sizeof(Element));
    }
    for (int64_t d = 0; d < D; ++d) {
      for (int64_t token = 0; token < N; ++token) {
        Doubles row;
        for (int64_t k = 0; k < I; ++k) row.push_back(value_of(x[token * I + k]));
        for (int64_t i = 0; i < G * H; ++i) {
          x_product[(d * N + token) * G * H + i] =
              float(dot(weight_ih.data() + (d * G * H + i) * I, 1, row.data(), I));
        }
      }
    }
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
  const Buffer<Element>& initial_state() const { return Cell::kHasCellState ? c0 : h0; }
  /// Direction d's initial state, null without one.
  const Element* state_or_null(const Buffer<Element>& state, int64_t d) const {
    return c.hx ? of_direction(state, d) : nullptr;
  }
  const int64_t* lengths_or_null() const { return batch.packed ? nullptr : lengths.data(); }
};

// ---- the expected results -----------------------------------------------------------------------

/// Shapes as in params.h; dbias_ih and dbias_hh [D, G*H], masked_x [N, I]. The padding is zero.
struct Expected {
  Doubles y, h_n, c_n, saved, dgates, h_previous, dh0, dc0, dbias_ih, dbias_hh, masked_x;

  explicit Expected(const Problem& p)
      : y(size_t(p.N * p.D * p.H)),
        h_n(size_t(p.D * p.B * p.H), std::nan("")),
        c_n(h_n),
        saved(size_t(p.D * p.N * A * p.H)),
        dgates(size_t(p.D * p.N * S * p.H)),
        h_previous(size_t(p.D * p.N * p.H)),
        dh0(h_n),
        dc0(h_n),
        dbias_ih(size_t(p.D * G * p.H)),
        dbias_hh(dbias_ih),
        masked_x(size_t(p.N * p.I)) {
    for (int64_t d = 0; d < p.D; ++d) {
      for (int64_t b = 0; b < p.B; ++b) {
        forward(p, d, b);
        backward(p, d, b);
      }
    }
    for (int64_t b = 0; b < p.B; ++b) {
      for (const int64_t t : p.batch.times(b, 0)) {
        const int64_t at = p.batch.token(t, b) * p.I;
        for (int64_t k = 0; k < p.I; ++k) masked_x[size_t(at + k)] = value_of(p.x[at + k]);
      }
    }
  }

 private:
  /// A tensor's vector [H] for row b in direction d.
  static Doubles row(const Problem& p, const Buffer<Element>& state, int64_t d, int64_t b) {
    const Element* const begin = p.of_direction(state, d) + b * p.H;
    Doubles values;
    for (int64_t u = 0; u < p.H; ++u) values.push_back(value_of(begin[u]));
    return values;
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
                                 : value_of(p.initial_state()[first + u]);
        const double dh_of_step = dh[size_t(u)] + value_of(p.dy[(token * p.D + d) * H + u]);
        scalar::cell_backward<Cell>(of_unit, state, dh_of_step, dstate[size_t(u)], dgate);
        for (int s = 0; s < S; ++s) dgates[size_t((at * S + s) * H + u)] = dgate[s];
        for (int g = 0; g < G; ++g) {
          dhidden[size_t(g * H + u)] = rounded(dgate[Cell::hidden_preact[g]]);
          dbias_ih[size_t((d * G + g) * H + u)] += dgate[Cell::input_preact[g]];
          dbias_hh[size_t((d * G + g) * H + u)] += dgate[Cell::hidden_preact[g]];
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
  Buffer<Element> y, h_n, c_n;
  Buffer<float> saved;
  Buffer<float> expected_saved;  ///< read by the backward pass
  Buffer<Element> dgates, h_previous, dh0, dc0, dbias_ih, dbias_hh, masked_x;

  Results(const Problem& p, const Expected& expected)
      : y(p.N * p.D * p.H, element_nan()),
        h_n(p.D * p.B * p.H, element_nan()),
        c_n(p.D * p.B * p.H, element_nan()),
        saved(p.D * p.N * A * p.H, std::nanf("")),
        expected_saved(saved.size()),
        dgates(p.D * p.N * S * p.H, element_nan()),
        h_previous(p.D * p.N * p.H, element_nan()),
        dh0(p.D * p.B * p.H, element_nan()),
        dc0(p.D * p.B * p.H, element_nan()),
        dbias_ih(p.D * G * p.H, element_nan()),
        dbias_hh(p.D * G * p.H, element_nan()),
        masked_x(p.N * p.I, element_nan()) {
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
  params.prefetches = true;  // so that its addresses are seen
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
                           p.state_or_null(p.h0, d),
                           p.state_or_null(p.c0, d),
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
                           p.state_or_null(p.h0, d),
                           p.state_or_null(p.c0, d),
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
  problem.is_bounded = Cell::kIsBounded && !p.c.hx;
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
  Stepwise(const Problem& p, const Results& r, int64_t d) : p_(p), r_(r), d_(d) {}

  int run() {
    int status = 0;
    for (int64_t i = 0; i < p_.T && !status; ++i) status = forward(i);
    for (int64_t i = p_.T - 1; i >= 0 && !status; --i) status = backward(i);
    return status ? status : initial_gradients();
  }

 private:
  int64_t time(int64_t i) const { return i < 0 ? -1 : d_ ? p_.T - 1 - i : i; }
  /// Row 0's token, in tensors of all directions.
  int64_t token(int64_t t) const { return d_ * p_.N + p_.batch.token(t, 0); }
  StepRows rows(int64_t t, bool all) const {
    const int64_t rows = p_.batch.rows(t);
    return {rows, all ? p_.B : rows, t, p_.T, p_.lengths_or_null()};
  }

  /// product [rows, n] = operands [rows, k] w^T, w [n, k] with these strides.
  static void multiply(const Buffer<float>& product, const Element* operands, const Element* w,
                       int64_t rows, int64_t n, int64_t k, int64_t n_stride, int64_t k_stride) {
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
    const bool is_last = i + 1 == p_.T, is_fused = p_.c.is_fused;
    FusedStepParams<Element> s;
    static_cast<StepRows&>(s) = rows(t, i == 0 || is_last || is_fused);
    s.is_first = i == 0;
    s.hidden_size = H;
    s.h_before = i == 0 ? p_.of_direction(p_.h0, d_) : h_after(i - 1);
    s.h_before_stride = s.c0_stride = H;
    s.c0 = p_.of_direction(p_.c0, d_);
    s.bias_ih = p_.bias_ih.data() + d_ * G * H;
    s.bias_hh = p_.bias_hh.data() + d_ * G * H;
    s.state = state_.data();
    s.h = h_after(i);
    if (is_last) s.c_n = p_.of_direction(r_.c_n, d_);
    s.y = r_.y.data() + (p_.batch.token(t, 0) * p_.D + d_) * H;
    s.y_stride = p_.D * H;
    s.saved = r_.saved.data() + token(t) * A * H;
    s.x_product = p_.x_product.data() + token(t) * G * H;
    if (!is_fused) {
      const Buffer<float> h_product(p_.B * G * H);
      multiply(h_product, s.h_before, p_.weight_of(d_), s.rows, G * H, H, H, 1);
      s.h_product = h_product.data();
      return kernels().forward(s, nullptr);
    }
    if (i % 2 == 0) {  // the input's GEMM in the kernel too
      s.x_product = nullptr;
      s.x = p_.x.data() + p_.batch.token(t, 0) * p_.I;
      s.x_stride = s.input_size = p_.I;
      s.weight_ih = p_.weight_ih.data() + d_ * G * H * p_.I;
    }
    s.weight_hh = p_.weight_of(d_);
    return fused_step<Element>(scalar::Cells::index_of<Cell>())(s, nullptr);
  }
  /// Where the i-th step's h goes.
  Element* h_after(int64_t i) const {
    return !p_.c.is_fused || i + 1 == p_.T ? p_.of_direction(r_.h_n, d_)
                                           : h_.data() + i % 2 * p_.B * p_.H;
  }

  int backward(int64_t i) {
    const int64_t H = p_.H, t = time(i);
    BackwardStepParams<Element> s;
    static_cast<StepRows&>(s) = rows(t, i + 1 == p_.T);
    s.is_first = i + 1 == p_.T;
    s.previous = time(i - 1);
    s.previous_rows = s.previous < 0 ? 0 : p_.batch.rows(s.previous);
    s.dy = p_.dy.data() + (p_.batch.token(t, 0) * p_.D + d_) * H;
    s.dy_stride = p_.D * H;
    s.product = product_.data();
    s.product_rows = s.is_first ? 0 : p_.batch.rows(time(i + 1));
    s.dh_n = p_.of_direction(p_.dh_n, d_);
    s.dh = dh_.data();
    s.hidden_size = H;
    s.saved = r_.expected_saved.data() + token(t) * A * H;
    s.previous_saved = r_.expected_saved.data() + token(std::max<int64_t>(s.previous, 0)) * A * H;
    s.h0 = p_.of_direction(p_.h0, d_);
    s.c0 = p_.of_direction(p_.c0, d_);
    s.h0_stride = s.c0_stride = H;
    if (Cell::kHasCellState) s.dc_n = p_.of_direction(p_.dc_n, d_);
    s.dstate = state_.data();
    s.dgates = r_.dgates.data() + token(t) * S * H;
    s.dhidden = dhidden_.data();
    s.h_previous = r_.h_previous.data() + token(t) * H;
    const int status = kernels().backward(s, nullptr);
    multiply(product_, dhidden_.data(), p_.weight_of(d_), s.rows, H, G * H, 1, H);
    return status;
  }

  int initial_gradients() const {
    InitialGradientParams<Element> s;
    s.rows = p_.B;
    s.hidden_size = s.output_size = p_.H;
    s.dh = dh_.data();
    s.product = product_.data();
    s.dstate = state_.data();
    s.state_is_h = !Cell::kHasCellState;
    s.dh0 = p_.of_direction(r_.dh0, d_);
    s.dc0 = p_.of_direction(r_.dc0, d_);
    return cuda::initial_gradients(s, nullptr);
  }

  static const StepKernels<Element>& kernels() {
    return step_kernels<Element>(scalar::Cells::index_of<Cell>());
  }

  const Problem& p_;
  const Results& r_;
  const int64_t d_;
  Buffer<Element> h_{2 * p_.B * p_.H, element_nan()}, dhidden_{p_.B * G * p_.H, element_nan()};
  Buffer<float> state_{p_.B * p_.H, std::nanf("")}, dh_{p_.B * p_.H, std::nanf("")};
  Buffer<float> product_{p_.B * p_.H, std::nanf("")};
};

std::string run_stepwise(const Problem& p, const Results& r) {
  int status = 0;
  for (int64_t d = 0; d < p.D && !status; ++d) status = Stepwise(p, r, d).run();
  return error_of(status);
}

/// The kernels around the time loop.
std::string run_around(const Problem& p, const Results& r) {
  int status = 0;
  for (int64_t d = 0; d < p.D && !status; ++d) {
    BiasGradientParams<Element> s;
    s.tokens = p.N;
    s.hidden_size = p.H;
    s.preacts = S;
    s.gates = G;
    std::copy_n(Cell::hidden_preact, G, s.hidden_preact);
    s.dgates = r.dgates.data() + d * p.N * S * p.H;
    s.bias_ih = r.dbias_ih.data() + d * G * p.H;
    s.bias_hh = r.dbias_hh.data() + d * G * p.H;
    status = bias_gradients(s, nullptr);
  }
  MaskPaddingParams<Element> s;
  s.steps = p.T;
  s.rows = p.B;
  s.features = s.x_stride = p.I;
  s.x = p.x.data();
  s.lengths = p.lengths.data();
  s.out = r.masked_x.data();
  if (!status && !p.batch.packed) status = mask_padding(s, nullptr);
  return error_of(status);
}

// ---- comparison ---------------------------------------------------------------------------------

/// The largest error; infinite where a result is NaN. A NaN in `expected` is not checked.
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
  std::string failure =
      c.algorithm == Algorithm::stepwise ? run_stepwise(p, found) : run_persistent(p, found);
  if (failure.empty()) failure = run_around(p, found);
  if (!failure.empty()) return failure;
  const struct {
    const char* name;
    double error;
  } errors[] = {
      {"y", largest_error(found.y, expected.y)},
      {"h_n", largest_error(found.h_n, expected.h_n)},
      {"c_n", largest_error(found.c_n, expected.c_n)},
      {"saved", largest_error(found.saved, expected.saved)},
      {"dgates", largest_error(found.dgates, expected.dgates)},
      {"h_previous", largest_error(found.h_previous, expected.h_previous)},
      {"dh0", largest_error(found.dh0, expected.dh0)},
      {"dc0", largest_error(found.dc0, expected.dc0)},
      {"bias_ih's gradient", largest_error(found.dbias_ih, expected.dbias_ih)},
      {"bias_hh's gradient", largest_error(found.dbias_hh, expected.dbias_hh)},
      {"masked x", p.batch.packed ? 0 : largest_error(found.masked_x, expected.masked_x)}};
  for (const auto& [name, error] : errors) {
    if (!(error < 10 * unit_of(c))) {
      return std::string("wrong ") + name + ": error " + std::to_string(error);
    }
  }
  return "";
}

/// Whether forward calls refuse lengths out of range; returns an error, empty if they do.
std::string run_lengths_out_of_range(const Case& c) {
  emulator::set({0, c.multiprocessors, c.multiprocessors});
  for (const int64_t length : {-1, c.T + 1}) {
    const Problem p(c, 0);
    const Results found(p, Expected(p));
    p.lengths[c.B - 1] = length;
    const std::string failure =
        c.algorithm == Algorithm::stepwise ? run_stepwise(p, found) : run_persistent(p, found);
    if (failure.find("lengths must be from 0 to the sequence length") == std::string::npos) {
      return "accepted a length of " + std::to_string(length) + failure;
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
      // Rows a warp: 8 in two tiles, 4 and 1. GEMMs with and without wide loads.
      {step, own, 3, 11, 21, 2, "padded", 8, true, true},
      {step, own, 5, 7, 40, 2, "packed", 8, true, true},
      {step, own, 4, 3, 16, 2, "lengths", 8, true, true},
      {step, own, 2, 1, 300, 1, "padded", 8, true, true},
      {cta, own, 3, 3, 21, 1, "padded", 8},
      {cta, own, 4, 17, 8, 2, "lengths", 8},
      // The second tile has no rows in the last steps. All warps but one or two have units.
      {cta, own, 4, 9, sizeof(Element) == 2 ? 104 : 56, 2, "packed", 8},
      // Tiles of two rows, by the kernels for few rows.
      {cta, own, 3, 16, 40, 1, "padded", 8},
      {cta, own, 3, 16, sizeof(Element) == 2 ? 104 : 56, 1, "lengths", 8},
      // Two or three CTAs a group; tiles of 8 rows, and of one chunk or two of 16 rows. With more
      // steps than slots, words are cleared and stored again.
      {grid, own, 23, 3, 21, 2, "padded", 8},
      {grid, own, 12, 20, 18, 1, "packed", 2},
      {grid, own, 4, 20, 18, 1, "lengths", 4},
      {grid, own, 17, 2, 37, 1, "lengths", 3},
      {grid, own, 3, 3, 18, 1, "padded", 2, true, false, true},
      // Enough units for several of the warps that share K.
      {grid, own, 2, 9, 150, 1, "padded", 10},
      // Two or three CTAs a cluster; tiles of two chunks where few clusters find room.
      {cluster, tf32, 3, 3, 21, 2, "padded", 8},
      {cluster, tf32, 5, 20, 40, 1, "packed", 2},
      {cluster, tf32, 4, 12, 70, 2, "lengths", 6},
      // Enough units for both of the warps that share K.
      {cluster, tf32, 3, 3, 140, 1, "padded", 5},
  };
  if (sizeof(Element) == 4) {
    cases.push_back({cta, tf32, 3, 3, 21, 1, "padded", 8});
    cases.push_back({cta, tf32, 4, 9, 56, 1, "packed", 8});
    cases.push_back({grid, tf32, 11, 20, 18, 2, "lengths", 4});
    cases.push_back({grid, tf32, 3, 3, 18, 1, "padded", 2, true, false, true});
    // Float16 operands.
    cases.push_back({cta, tf32, 3, 3, 21, 1, "padded", 8, false});
    cases.push_back({grid, tf32, 11, 20, 18, 2, "lengths", 4, false});
    cases.push_back({cluster, tf32, 5, 20, 40, 1, "packed", 2, false});
  }
  return cases;
}

}  // namespace

#ifdef __SANITIZE_THREAD__
constexpr bool kHasTsan = true;
#else
constexpr bool kHasTsan = false;
#endif

int main(int argc, char** argv) {
  const int seeds = argc > 1 ? std::atoi(argv[1]) : 1;
  const std::string left_out = argc > 2 ? argv[2] : "";
  catch_faults();
  const std::vector<Case> cases = all_cases();
  for (int seed = 0; seed < seeds; ++seed) {
    for (const Case& c : cases) {
      if (name_of(c.algorithm) == left_out) continue;
      if (c.algorithm != Algorithm::stepwise && !is_compiled(c.algorithm)) continue;
      // Many CTAs take minutes there, and have the same accesses as fewer.
      if (kHasTsan && c.H > 128 && c.algorithm != Algorithm::stepwise) continue;
      std::string wrong = run(c, unsigned(seed));
      // ThreadSanitizer takes the report of a launch that ends early for the kernel's own work.
      if (wrong.empty() && seed == 0 && !kHasTsan && std::string_view(c.layout) == "lengths") {
        wrong = run_lengths_out_of_range(c);
      }
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
