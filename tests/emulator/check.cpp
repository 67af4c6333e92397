// The recurrent and step kernels of one cell and type without torch, against plain loops in double:
// what ThreadSanitizer's pass runs, and what must fail when a bug is planted.
//
//   check [seeds [regime that is left out]]
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
#include <functional>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "recurrent.cuh"

using namespace fusedrnn;
using namespace fusedrnn::cuda;
using Cell = scalar::FUSEDRNN_CELL;
using S = FUSEDRNN_OPERAND;
constexpr int G = Cell::kGates, A = Cell::kSaved, kPreacts = Cell::kPreacts;

namespace {

template <class T>
class Buffer {
 public:
  explicit Buffer(size_t size, T value = T{}) : size_(size) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE)), bytes = size * sizeof(T);
    const size_t pages = (bytes + page - 1) / page * page;
    auto* base = static_cast<unsigned char*>(
        mmap(nullptr, pages + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (pages && mprotect(base, pages, PROT_READ | PROT_WRITE)) std::abort();
    data_ = reinterpret_cast<T*>(base + pages - bytes);
    std::fill_n(data_, size, value);
  }
  T* data() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return size_; }

 private:  // never given back: a late access would not be seen else
  size_t size_;
  T* data_;
};

const float kNan = std::nanf("");

double rounded(double x) {
  S s;
  round_to(s, float(x));
  return value_of(s);
}

struct Case {
  const char* regime;
  Precision precision;
  int T, B, H, D;
  const char* layout;
  int multiprocessors;
};

struct Problem {
  const Case& c;
  std::mt19937 random;
  std::vector<int64_t> lengths, position;
  int64_t N;

  Problem(const Case& c, unsigned seed) : c(c), random(seed), lengths(c.B, c.T) {
    const bool packed = std::string(c.layout) == "packed";
    if (std::string(c.layout) != "padded") {
      for (auto& l : lengths) l = int64_t(random() % unsigned(c.T + !packed)) + packed;
    }
    if (packed) {
      std::sort(lengths.rbegin(), lengths.rend());
      lengths[0] = c.T;
    }
    position.push_back(0);
    for (int t = 0; t < c.T; ++t) {
      const auto size =
          std::count_if(lengths.begin(), lengths.end(), [&](int64_t l) { return l > t; });
      position.push_back(packed ? position.back() + size : int64_t(t + 1) * c.B);
    }
    N = position.back();
  }
  int64_t at(int64_t t, int64_t b) const { return position[t] + b; }
  float next() { return float(int(random() % 2001) - 1000) / 1000; }
  template <class V>
  Buffer<V> values(size_t n, float scale = 1) {
    Buffer<V> v(n);
    for (size_t i = 0; i < n; ++i) round_to(v[i], next() * scale);
    return v;
  }
};

/// The worst error of `got`, taking NaN for infinite; skips positions that hold nothing.
template <class V, class F>
double worst(const Buffer<V>& got, const F& expected) {
  double error = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double e = expected(i);
    if (std::isnan(e)) continue;
    const double difference = std::fabs(double(value_of(got[i])) - e);
    error = std::isnan(difference) ? INFINITY : std::max(error, difference);
  }
  return error;
}

double dot(const S* w, int64_t stride, const double* x, int64_t n) {
  double sum = 0;
  for (int64_t k = 0; k < n; ++k) sum += double(value_of(w[k * stride])) * x[k];
  return sum;
}

std::string status_text(int status) { return status ? emulator::last_error() : ""; }

/// Runs one case, forward and back; returns what is wrong with it.
std::string run(const Case& c, unsigned seed) {
  Problem p(c, seed);
  const int64_t T = c.T, B = c.B, H = c.H, D = c.D, N = p.N;
  const bool step = std::string(c.regime) == "step";
  const bool packed = std::string(c.layout) == "packed";
  emulator::set({seed, c.multiprocessors, c.multiprocessors});
  const auto weight = p.values<S>(size_t(D * G * H * H), 1.5f / std::sqrt(float(H)));
  // One element more than is used, so that it is not aligned to more than one.
  const auto bias_ih = p.values<S>(size_t(D * G * H + 1)), bias_hh = p.values<S>(size_t(D * G * H));
  const auto x = p.values<float>(size_t(D * N * G * H));
  const auto h0 = p.values<float>(size_t(D * B * H)), c0 = p.values<float>(size_t(D * B * H));
  const auto dy = p.values<float>(size_t(N * D * H));
  const auto dh_n = p.values<float>(size_t(D * B * H)), dc_n = p.values<float>(size_t(D * B * H));
  Buffer<int64_t> lengths(p.lengths.size()), position(p.position.size());
  std::copy(p.lengths.begin(), p.lengths.end(), lengths.data());
  std::copy(p.position.begin(), p.position.end(), position.data());

  // What should come out.
  const auto nan = [](int64_t n) { return std::vector<double>(size_t(n), std::nan("")); };
  std::vector<double> y = nan(N * D * H), h_n = nan(D * B * H), c_n = h_n,
                      saved = nan(D * N * A * H);
  std::vector<double> dgates = nan(D * N * kPreacts * H), h_previous = nan(D * N * H);
  std::vector<double> dh0 = nan(D * B * H), dc0 = dh0;
  for (int64_t d = 0; d < D; ++d) {
    const S* w = weight.data() + d * G * H * H;
    for (int64_t b = 0; b < B; ++b) {
      std::vector<double> h(h0.data() + (d * B + b) * H, h0.data() + (d * B + b + 1) * H),
          state = h;
      if (Cell::kHasCellState) {
        state.assign(c0.data() + (d * B + b) * H, c0.data() + (d * B + b + 1) * H);
      }
      std::vector<int64_t> times;
      for (int64_t t = 0; t < p.lengths[b]; ++t) times.push_back(t);
      if (d == 1) std::reverse(times.begin(), times.end());
      for (const int64_t t : times) {
        std::vector<double> operand(h.size()), next(h.size());
        std::transform(h.begin(), h.end(), operand.begin(), rounded);
        for (int64_t u = 0; u < H; ++u) {
          double sum[kPreacts] = {}, kept[A];
          for (int g = 0; g < G; ++g) {
            const int64_t row = g * H + u;
            sum[Cell::input_preact[g]] += x[size_t((d * N + p.at(t, b)) * G * H + row)] +
                                          value_of(bias_ih[size_t(d * G * H + row)]);
            sum[Cell::hidden_preact[g]] +=
                dot(w + row * H, 1, operand.data(), H) + value_of(bias_hh[size_t(d * G * H + row)]);
          }
          next[u] = Cell::forward(sum, state[u], kept);
          for (int a = 0; a < A; ++a) saved[((d * N + p.at(t, b)) * A + a) * H + u] = kept[a];
          y[(p.at(t, b) * D + d) * H + u] = next[u];
        }
        for (int64_t u = 0; u < H; ++u) h_previous[(d * N + p.at(t, b)) * H + u] = operand[u];
        h = next;
      }
      for (int64_t u = 0; u < H; ++u) {
        h_n[(d * B + b) * H + u] = h[u];
        c_n[(d * B + b) * H + u] = state[u];
      }
      // Back.
      std::vector<double> dh(dh_n.data() + (d * B + b) * H, dh_n.data() + (d * B + b + 1) * H);
      std::vector<double> dstate(h.size());
      if (Cell::kHasCellState) {
        dstate.assign(dc_n.data() + (d * B + b) * H, dc_n.data() + (d * B + b + 1) * H);
      }
      for (size_t i = times.size(); i-- > 0;) {
        const int64_t t = times[i];
        std::vector<double> fed(size_t(G * H));
        for (int64_t u = 0; u < H; ++u) {
          double kept[A], dgate[kPreacts];
          for (int a = 0; a < A; ++a) kept[a] = saved[((d * N + p.at(t, b)) * A + a) * H + u];
          const int64_t from = i ? p.at(times[i - 1], b) : 0;
          const double before = i ? saved[((d * N + from) * A + Cell::kSavedState) * H + u]
                                  : (!Cell::kHasCellState ? h0 : c0)[size_t((d * B + b) * H + u)];
          Cell::backward(kept, before, dh[u] + dy[size_t((p.at(t, b) * D + d) * H + u)], dstate[u],
                         dgate);
          for (int s = 0; s < kPreacts; ++s)
            dgates[((d * N + p.at(t, b)) * kPreacts + s) * H + u] = dgate[s];
          for (int g = 0; g < G; ++g) fed[g * H + u] = rounded(dgate[Cell::hidden_preact[g]]);
        }
        for (int64_t u = 0; u < H; ++u) dh[u] = dot(w + u, H, fed.data(), G * H);
      }
      for (int64_t u = 0; u < H; ++u) {
        dh0[(d * B + b) * H + u] = dh[u] + (!Cell::kHasCellState ? dstate[u] : 0);
        dc0[(d * B + b) * H + u] = dstate[u];
      }
    }
  }

  // What does.
  Buffer<float> saved_in(saved.size());
  for (size_t i = 0; i < saved.size(); ++i) saved_in[i] = float(saved[i]);
  S poison;
  round_to(poison, kNan);
  Buffer<S> out_y(y.size(), poison), out_h_n(h_n.size(), poison);
  Buffer<float> out_c_n(c_n.size(), kNan), out_saved(saved.size(), kNan);
  Buffer<S> out_dgates(dgates.size()), out_h_previous(h_previous.size(), poison);
  Buffer<float> out_dh0(dh0.size(), kNan), out_dc0(dc0.size(), kNan);
  int status = 0;
  if (!step) {
    const std::string regime = c.regime;
    const auto cut_for = [&](bool backward) {
      if (regime != "cluster") {
        return cut_of(T, B, H, D, sizeof(S), c.multiprocessors, regime == "grid");
      }
      const Cut cut = cluster_cut_of(T, B, H, sizeof(S));
      return spread(cut, B, D, recurrent_clusters<Cell, S>(cut, backward, c.precision));
    };
    const Cut cut = cut_for(false), back = cut_for(true);
    const Reach reach = regime == "alone"     ? Reach::cta
                        : regime == "cluster" ? Reach::cluster
                                              : Reach::grid;
    if (cut.groups == 0 || cut.reach != reach) return "the case has another cut";
    const auto set = [&](Recurrence& r, const Cut& cut) {
      r.steps = int(T);
      r.rows = int(B);
      r.hidden_size = int(H);
      r.directions = int(D);
      r.tile_rows = int(cut.tile_rows);
      r.lengths = packed ? nullptr : lengths.data();
      r.position = packed ? position.data() : nullptr;
      r.arrivals = Buffer<uint32_t>(size_t(D * cut.groups)).data();
    };
    const auto exchange = [&](int64_t parts) {
      return Buffer<S>(size_t(2 * cut.groups * cut.tile_rows * parts * cut.depth)).data();
    };
    RecurrentForward<S> f;
    RecurrentBackward<S> r;
    set(f, cut);
    set(r, back);
    f.y_stride = r.dy_stride = D * H;
    f.h0_stride = f.c0_stride = r.h0_stride = r.c0_stride = H;
    for (int64_t d = 0; d < D; ++d) {
      const auto state = [&](const Buffer<float>& s) { return s.data() + d * B * H; };
      f.direction[d] = {weight.data() + d * G * H * H,
                        bias_ih.data() + d * G * H,
                        bias_hh.data() + d * G * H,
                        x.data() + d * N * G * H,
                        state(h0),
                        state(c0),
                        out_y.data() + d * H,
                        out_h_n.data() + d * B * H,
                        state(out_c_n),
                        out_saved.data() + d * N * A * H,
                        exchange(1)};
      r.direction[d] = {weight.data() + d * G * H * H,
                        saved_in.data() + d * N * A * H,
                        state(h0),
                        state(c0),
                        dy.data() + d * H,
                        state(dh_n),
                        !Cell::kHasCellState ? nullptr : state(dc_n),
                        out_dgates.data() + d * N * kPreacts * H,
                        out_h_previous.data() + d * N * H,
                        state(out_dh0),
                        state(out_dc0),
                        exchange(G)};
    }
    status = recurrent_forward<Cell>(f, cut, c.precision, nullptr);
    if (!status) status = recurrent_backward<Cell>(r, back, c.precision, nullptr);
  } else {
    for (int64_t d = 0; d < D && !status; ++d) {
      const S* w = weight.data() + d * G * H * H;
      Buffer<S> h(size_t(B * H));
      Buffer<float> state(size_t(B * H)), product(size_t(B * G * H)), dh(size_t(B * H));
      Buffer<float> back(size_t(B * H));
      Buffer<S> dhidden(size_t(B * G * H));
      for (int64_t i = 0; i < B * H; ++i) {
        round_to(h[i], h0[size_t(d * B * H + i)]);
        state[i] = (!Cell::kHasCellState ? h0 : c0)[size_t(d * B * H + i)];
      }
      const auto rows_of = [&](int64_t t) { return p.position[t + 1] - p.position[t]; };
      const auto time = [&](int64_t i) { return i < 0 ? -1 : d ? T - 1 - i : i; };
      for (int64_t i = 0; i < T && !status; ++i) {
        ForwardStep<S> s;
        s.t = time(i);
        s.rows = rows_of(s.t);
        for (int64_t j = 0; j < s.rows * G * H; ++j) {
          std::vector<double> operand(static_cast<size_t>(H));
          for (int64_t k = 0; k < H; ++k) operand[k] = value_of(h[j / (G * H) * H + k]);
          product[j] = float(dot(w + j % (G * H) * H, 1, operand.data(), H));
        }
        s.lengths = packed ? nullptr : lengths.data();
        s.hidden_size = H;
        s.x_product = x.data() + (d * N + p.position[s.t]) * G * H;
        s.h_product = product.data();
        s.bias_ih = bias_ih.data() + d * G * H;
        s.bias_hh = bias_hh.data() + d * G * H;
        s.state = state.data();
        s.h = h.data();
        s.y = out_y.data() + (p.position[s.t] * D + d) * H;
        s.y_stride = D * H;
        s.saved = out_saved.data() + (d * N + p.position[s.t]) * A * H;
        status = forward_step<Cell>(s, nullptr);
      }
      for (int64_t i = 0; i < B * H; ++i) {
        out_h_n[size_t(d * B * H + i)] = h[i];
        out_c_n[size_t(d * B * H + i)] = state[i];
        dh[i] = dh_n[size_t(d * B * H + i)];
        state[i] = !Cell::kHasCellState ? 0 : dc_n[size_t(d * B * H + i)];
      }
      for (int64_t i = T - 1; i >= 0 && !status; --i) {
        BackwardStep<S> s;
        s.t = time(i);
        s.before = time(i - 1);
        s.rows = rows_of(s.t);
        s.rows_before = s.before < 0 ? 0 : rows_of(s.before);
        s.lengths = packed ? nullptr : lengths.data();
        s.hidden_size = H;
        s.saved = saved_in.data() + (d * N + p.position[s.t]) * A * H;
        s.saved_before =
            saved_in.data() + (d * N + p.position[std::max<int64_t>(s.before, 0)]) * A * H;
        s.h0 = h0.data() + d * B * H;
        s.c0 = c0.data() + d * B * H;
        s.h0_stride = s.c0_stride = H;
        s.dy = dy.data() + (p.position[s.t] * D + d) * H;
        s.dy_stride = D * H;
        s.product = back.data();
        s.dh = dh.data();
        s.dstate = state.data();
        s.dgates = out_dgates.data() + (d * N + p.position[s.t]) * kPreacts * H;
        s.dhidden = dhidden.data();
        s.h_previous = out_h_previous.data() + (d * N + p.position[s.t]) * H;
        status = backward_step<Cell>(s, nullptr);
        for (int64_t j = 0; j < s.rows * H; ++j) {
          std::vector<double> fed(static_cast<size_t>(G * H));
          for (int64_t k = 0; k < G * H; ++k) fed[k] = value_of(dhidden[j / H * G * H + k]);
          back[j] = float(dot(w + j % H, H, fed.data(), G * H));
        }
      }
      for (int64_t i = 0; i < B * H; ++i) {
        out_dh0[size_t(d * B * H + i)] = dh[i] + back[i] + (!Cell::kHasCellState ? state[i] : 0);
        out_dc0[size_t(d * B * H + i)] = state[i];
      }
    }
  }
  if (status) return status_text(status);

  const double unit = sizeof(S) == 4 ? (c.precision == Precision::tf32 && !step ? 1e-3 : 1e-6)
                      : std::is_same_v<S, BFloat16> ? 8e-3
                                                    : 1e-3;
  const auto of = [](const std::vector<double>& v) { return [&v](size_t i) { return v[i]; }; };
  const struct {
    const char* name;
    double error;
  } errors[] = {{"y", worst(out_y, of(y))},
                {"h_n", worst(out_h_n, of(h_n))},
                {"c_n", worst(out_c_n, of(c_n))},
                {"saved", worst(out_saved, of(saved))},
                {"dgates", worst(out_dgates, of(dgates))},
                {"h_previous", worst(out_h_previous, of(h_previous))},
                {"dh0", worst(out_dh0, of(dh0))},
                {"dc0", worst(out_dc0, of(dc0))}};
  for (const auto& [name, error] : errors) {
    if (!(error < 10 * unit))
      return std::string("wrong ") + name + ": error " + std::to_string(error);
  }
  return "";
}

void on_fault(int signal) {
  const std::string_view text = signal == SIGILL ? "FAILED: a misaligned access\n"
                                                 : "FAILED: touched memory outside of a buffer\n";
  const ssize_t written = write(1, text.data(), text.size());
  _exit(written > 0 ? 1 : 2);
}

}  // namespace

int main(int argc, char** argv) {
  const int seeds = argc > 1 ? std::atoi(argv[1]) : 1;
  const std::string left_out = argc > 2 ? argv[2] : "";
  // Not on the stack of the fiber, which may be what was left.
  stack_t stack = {};
  stack.ss_size = 64 * 1024;
  stack.ss_sp = std::malloc(stack.ss_size);
  sigaltstack(&stack, nullptr);
  struct sigaction action = {};
  action.sa_handler = on_fault;
  action.sa_flags = SA_ONSTACK;
  for (const int signal : {SIGSEGV, SIGBUS, SIGILL}) sigaction(signal, &action, nullptr);

  // Alone: all units in one CTA. Grid: two or three CTAs a group; tiles of one and of two products.
  const Precision own = sizeof(S) == 4 ? Precision::ieee : Precision::tf32;
  std::vector<Case> cases = {
      {"step", own, 3, 5, 7, 2, "padded", 8},    {"step", own, 4, 3, 8, 2, "packed", 8},
      {"step", own, 4, 3, 4, 2, "lengths", 8},   {"alone", own, 3, 3, 21, 1, "padded", 8},
      {"alone", own, 4, 17, 8, 2, "lengths", 8}, {"grid", own, 3, 3, 21, 2, "padded", 8},
      {"grid", own, 4, 20, 18, 1, "packed", 2},  {"grid", own, 4, 20, 18, 1, "lengths", 4},
  };
  // Clusters of two and three CTAs; tiles of one chunk, and of two where few clusters find room.
  const Case clusters[] = {
      {"cluster", Precision::tf32, 3, 3, 21, 2, "padded", 8},
      {"cluster", Precision::tf32, 5, 20, 40, 1, "packed", 2},
      {"cluster", Precision::tf32, 4, 12, 70, 2, "lengths", 6},
  };
  cases.insert(cases.end(), std::begin(clusters), std::end(clusters));
  if (sizeof(S) == 4) {
    cases.push_back({"alone", Precision::tf32, 3, 3, 21, 1, "padded", 8});
    cases.push_back({"grid", Precision::tf32, 3, 20, 18, 2, "lengths", 4});
  }
  for (int seed = 0; seed < seeds; ++seed) {
    for (const Case& c : cases) {
      const std::string wrong = c.regime == left_out ? "" : run(c, unsigned(seed));
      if (wrong.empty()) continue;
      std::printf("FAILED: %s, %s, T %d, B %d, H %d, D %d, seed %d: %s\n", c.regime, c.layout, c.T,
                  c.B, c.H, c.D, seed, wrong.c_str());
      return 1;
    }
  }
  const auto counts = emulator::counts();
  std::printf("%zu cases, %d seeds: %llu launches, %llu CTAs, %llu waits\n", cases.size(), seeds,
              (unsigned long long)counts.launches, (unsigned long long)counts.ctas,
              (unsigned long long)counts.waits);
}
