// The kernels without torch: an LSTM and a GRU layer of odd sizes against plain loops in double.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cpu/kernel_table.h"

namespace fusedrnn::cpu {
extern const KernelTable baseline_kernels;
}

using namespace fusedrnn;

static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// One row through all steps; returns the worst error in y [T, B, H].
static double worst_error(bool lstm, int T, int B, int I, int H, int b, const Weights<float>& w,
                          const float* x, const float* y) {
  const int G = lstm ? 4 : 3;
  std::vector<double> h(H), c(H), in(G * H), hidden(G * H);
  double worst = 0;
  for (int t = 0; t < T; ++t) {
    for (int r = 0; r < G * H; ++r) {
      in[r] = w.bias_ih[r];
      hidden[r] = w.bias_hh[r];
      for (int k = 0; k < I; ++k) in[r] += w.ih[r * I + k] * x[(t * B + b) * I + k];
      for (int k = 0; k < H; ++k) hidden[r] += w.hh[r * H + k] * h[k];
    }
    for (int u = 0; u < H; ++u) {
      const auto gate = [&](int g) { return in[g * H + u] + hidden[g * H + u]; };
      if (lstm) {
        c[u] = sigmoid(gate(1)) * c[u] + sigmoid(gate(0)) * std::tanh(gate(2));
        h[u] = sigmoid(gate(3)) * std::tanh(c[u]);
      } else {
        const double z = sigmoid(gate(1));
        const double n = std::tanh(in[2 * H + u] + sigmoid(gate(0)) * hidden[2 * H + u]);
        h[u] = (1 - z) * n + z * h[u];
      }
      worst = std::fmax(worst, std::fabs(h[u] - y[(t * B + b) * H + u]));
    }
  }
  return worst;
}

static double run(bool lstm, bool prepacked) {
  const cpu::KernelsOf<float>& table = cpu::baseline_kernels.f32;
  const cpu::Kernel<float>& kernel = table.cells[lstm ? scalar::Cells::index_of<scalar::Lstm>()
                                                      : scalar::Cells::index_of<scalar::Gru>()];
  const int T = 7, B = 5, I = 13, H = 21, G = lstm ? 4 : 3;
  const auto random = [](int n) {
    std::vector<float> v(n);
    for (float& value : v) value = float(std::rand() % 2001 - 1000) / 1000;
    return v;
  };
  const auto ih = random(G * H * I), hh = random(G * H * H), bias_ih = random(G * H),
             bias_hh = random(G * H), x = random(T * B * I);
  std::vector<float> y(T * B * H), h_n(B * H), c_n(B * H);
  std::vector<int64_t> row, active(T, B), step_offset, x_offset;
  for (int b = 0; b < B; ++b) row.push_back(b);
  for (int t = 0; t < T; ++t) {
    step_offset.push_back(t * B);
    x_offset.push_back(t * B * I);
  }
  Forward<float> s;
  s.steps = T;
  s.rows = B;
  s.input_size = I;
  s.hidden_size = s.output_size = s.y_stride = H;
  s.row = row.data();
  s.active = active.data();
  s.step_offset = step_offset.data();
  s.weights = {ih.data(), hh.data(), bias_ih.data(), bias_hh.data(), nullptr};
  const int64_t blocks = scalar::divide_up(H, table.common.lanes);
  const int64_t panel = kernel.forward_panel_size(I, H);
  std::vector<float> panels(blocks * panel), workspace(kernel.forward_workspace(s));
  for (int64_t b = 0; prepacked && b < blocks; ++b) {
    kernel.prepack_forward(s.weights, I, H, H, b, panels.data() + b * panel);
  }
  s.panels = prepacked ? panels.data() : nullptr;
  s.x = x.data();
  s.x_offset = x_offset.data();
  s.x_row_stride = I;
  s.y = y.data();
  s.h_n = h_n.data();
  s.c_n = c_n.data();
  s.workspace = workspace.data();
  kernel.forward_begin(s);
  for (int64_t i = 0; i < T; ++i) kernel.forward_step(s, i, 0, blocks);
  double worst = 0;
  for (int b = 0; b < B; ++b) {
    worst = std::fmax(worst, worst_error(lstm, T, B, I, H, b, s.weights, x.data(), y.data()));
  }
  return worst;
}

int main() {
  for (bool lstm : {true, false}) {
    for (bool prepacked : {true, false}) {
      const double worst = run(lstm, prepacked);
      std::printf("%s %s: error %g\n", lstm ? "LSTM" : "GRU", prepacked ? "prepacked" : "in place",
                  worst);
      if (!(worst < 2e-6)) return 1;
    }
  }
}
