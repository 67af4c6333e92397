#include "frozen.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <cstring>

namespace fusedrnn::cpu {
namespace {

constexpr char kMagic[8] = {'f', 'u', 's', 'e', 'd', 'r', 'n', 'n'};
constexpr int32_t kVersion = 2;
constexpr int64_t kHeaderBytes = 128, kSizesOffset = 64, kAlignment = 64;
/// Column vectors in a block of a GEMM's panels.
constexpr int64_t kPanelVectors = 4;

int64_t aligned(int64_t bytes) { return scalar::round_up(bytes, kAlignment); }

/// The upper half of a float32, rounded to nearest even. NaN stays NaN.
uint16_t to_bfloat16(float value) {
  const uint32_t bits = scalar::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return uint16_t(bits >> 16 | 64);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float from_bfloat16(uint16_t bits) { return scalar::bit_cast<float>(uint32_t(bits) << 16); }

template <class Item>
Item read(const unsigned char* p) {
  Item item;
  std::memcpy(&item, p, sizeof(item));
  return item;
}
template <class Item>
void write(unsigned char* p, Item item) {
  std::memcpy(p, &item, sizeof(item));
}

/// Calls f(place in the panels, column, k) for a matrix [K, columns] in prepack_gemm's order.
template <class F>
void for_each_in_gemm_panels(int64_t K, int64_t columns, int64_t lanes, const F& f) {
  const int64_t width = kPanelVectors * lanes;
  for (int64_t column = 0; column < columns; ++column) {
    const int64_t first = column / width * width;
    const int64_t step = std::min(scalar::round_up(columns - first, lanes), width);
    for (int64_t k = 0; k < K; ++k) f(K * first + k * step + column - first, column, k);
  }
}

}  // namespace

scalar::PanelLayout FrozenWeights::layout() const {
  int64_t lane_bytes = sizeof(float), per_lane = type() == WeightType::float32 ? 1 : 2;
  if (type() == WeightType::int8) lane_bytes = per_lane = header_.int8_per_lane;
  return {block_units(),
          cell().gates,
          cell().preacts,
          lane_bytes,
          per_lane,
          sizeof(float),
          type() == WeightType::int8};
}

bool FrozenWeights::fits(const KernelTable& table) const {
  return block_units() == table.f32.common.lanes &&
         (type() != WeightType::int8 || header_.int8_per_lane == table.frozen_int8.common.per_lane);
}

int64_t FrozenWeights::panels_bytes() const {
  return aligned(blocks() * layout().size(sizes().I, sizes().P));
}
int64_t FrozenWeights::projection_bytes() const {
  if (!sizes().has_projection) return 0;
  return aligned(sizes().H * scalar::round_up(sizes().P, block_units()) * int64_t(sizeof(float)));
}
int64_t FrozenWeights::direction_bytes() const {
  const int64_t biases = sizes().has_bias ? 2 * cell().gates * sizes().H : 0;
  return panels_bytes() + projection_bytes() + aligned(biases * int64_t(sizeof(float)));
}
int64_t FrozenWeights::bytes() const { return kHeaderBytes + sizes().D * direction_bytes(); }

unsigned char* FrozenWeights::at(int64_t d, int64_t offset) const {
  auto* const data = static_cast<unsigned char*>(const_cast<void*>(packed_.const_data_ptr()));
  return data + kHeaderBytes + d * direction_bytes() + offset;
}

int64_t FrozenWeights::place(int64_t offset, int64_t vector, int64_t unit) const {
  const scalar::PanelLayout panel = layout();
  return unit / panel.units * panel.size(sizes().I, sizes().P) + offset +
         (vector * panel.units + unit % panel.units) * int64_t(sizeof(float));
}

template <class F>
void FrozenWeights::for_each_weight(int matrix, const F& f) const {
  const scalar::PanelLayout panel = layout();
  const int64_t H = sizes().H, K = matrix ? sizes().P : sizes().I;
  const int64_t panel_bytes = panel.size(sizes().I, sizes().P);
  const int64_t begin =
      panel.weights_offset() + (matrix ? panel.rows(sizes().I) * panel.row_bytes() : 0);
  for (int64_t row = 0; row < panel.gates * H; ++row) {
    const int64_t gate = row / H, unit = row % H;
    const int64_t lane = gate * panel.units + unit % panel.units;
    const int64_t first = unit / panel.units * panel_bytes + begin + lane * panel.lane_bytes;
    for (int64_t k = 0; k < K; ++k) {
      f(first + k / panel.per_lane * panel.row_bytes() +
            k % panel.per_lane * (panel.lane_bytes / panel.per_lane),
        row, k);
    }
  }
}

FrozenWeights::FrozenWeights(const Tensor& packed) {
  const auto check = [](bool condition) {
    TORCH_CHECK(condition, "Expected weights from torch.ops.fusedrnn._freeze");
  };
  check(packed.defined() && packed.device().is_cpu() && packed.scalar_type() == at::kByte &&
        packed.dim() == 1 && packed.numel() >= kHeaderBytes && packed.is_contiguous());
  const auto* const data = static_cast<const unsigned char*>(packed.const_data_ptr());
  // A field at a time: reading a bool of another value would be undefined.
  int64_t number[6];
  std::memcpy(&header_, data, offsetof(Header, sizes));
  std::memcpy(number, data + kSizesOffset, sizeof(number));
  check(std::memcmp(header_.magic, kMagic, sizeof(kMagic)) == 0 && header_.version == kVersion);
  check(header_.cell >= 0 && header_.cell < scalar::Cells::count && header_.type >= 0 &&
        header_.type <= int32_t(WeightType::int8));
  check(header_.block_units == 4 || header_.block_units == 8 || header_.block_units == 16);
  check(header_.int8_per_lane == 2 || header_.int8_per_lane == 4);
  header_.sizes = {number[0], number[1], number[2], number[3], number[4] == 1, number[5] == 1};
  const FrozenSizes& s = header_.sizes;
  const auto is_size = [](int64_t n, int64_t least) { return n >= least && n < int64_t(1) << 31; };
  check(is_size(s.I, 0) && is_size(s.H, 1) && is_size(s.P, 1) && (s.D == 1 || s.D == 2));
  check((s.has_projection ? cell().has_projection : s.P == s.H) &&
        double(s.H) * (double(s.I) + double(s.P)) < 1e15 && bytes() == packed.numel());
  packed_ = reinterpret_cast<uintptr_t>(data) % 4 == 0 ? packed : packed.clone();
}

Tensor freeze(const CellInfo& cell, at::TensorList weights, bool bidirectional, WeightType type,
              const KernelTable& table) {
  const int64_t block_units = table.f32.common.lanes;
  TORCH_CHECK(weights[0].device().is_cpu(), "_freeze: weights must be on the CPU, got ",
              weights[0].device());
  TORCH_CHECK(weights[0].scalar_type() == at::kFloat, "_freeze: weights must be float32, got ",
              weights[0].scalar_type());
  TORCH_CHECK(weights[0].dim() == 2, "_freeze: Expected weight_ih to be 2D, got ", weights[0].dim(),
              "D");
  const Tensor input = at::empty({1, 0, weights[0].size(1)}, weights[0].options());
  const Layer layer(cell, LayerArgs{input, {}, {}, weights, bidirectional, {}, {}});
  TORCH_CHECK(type != WeightType::int8 || (cell.is_bounded && !layer.has_projection),
              "_freeze: ", cell.name, layer.has_projection ? " with a projection" : "",
              " can't have int8 weights: its states are not bounded");

  TORCH_CHECK(type != WeightType::int8 || largest_operand(std::max(layer.I, layer.P)) >= 127,
              "_freeze: int8 weights can't have more than 133000 columns");

  FrozenWeights to(FrozenWeights::Header{
      {},
      kVersion,
      cell.index,
      int32_t(type),
      int32_t(block_units),
      int32_t(table.frozen_int8.common.per_lane),
      {layer.I, layer.H, layer.P, layer.D, layer.has_bias, layer.has_projection}});
  to.packed_ = at::zeros({to.bytes()}, weights[0].options().dtype(at::kByte));
  unsigned char* const data = to.at(0, -kHeaderBytes);
  std::memcpy(data, &to.header_, offsetof(FrozenWeights::Header, sizes));
  std::memcpy(data, kMagic, sizeof(kMagic));
  const int64_t number[6] = {layer.I, layer.H,        layer.P,
                             layer.D, layer.has_bias, layer.has_projection};
  std::memcpy(data + kSizesOffset, number, sizeof(number));

  const scalar::PanelLayout panel = to.layout();
  const int64_t H = layer.H, G = cell.gates;
  for (int64_t d = 0; d < layer.D; ++d) {
    const DirectionWeights& w = layer.weights[size_t(d)];
    auto* const panels = to.at(d, 0);
    for (int matrix = 0; matrix < 2; ++matrix) {
      const Tensor& tensor = matrix ? w.hh : w.ih;
      const auto* const values = tensor.const_data_ptr<float>();
      const int64_t K = tensor.size(1);
      std::vector<float> scale(size_t(G * H), 0.0f);
      const auto of_row = [&](int64_t offset, int64_t row) {
        return panels + to.place(offset, matrix * G + row / H, row % H);
      };
      if (type == WeightType::int8) {
        for (int64_t row = 0; row < G * H; ++row) {
          float most = 0;
          for (int64_t k = 0; k < K; ++k) {
            const float size = std::fabs(values[row * K + k]);
            TORCH_CHECK(std::isfinite(size), "_freeze: int8 weights must be finite");
            most = std::max(most, size);
          }
          scale[size_t(row)] = most / 127;
          write(of_row(panel.scales_offset(), row), scale[size_t(row)]);
        }
      }
      to.for_each_weight(matrix, [&](int64_t at, int64_t row, int64_t k) {
        const float value = values[row * K + k];
        if (type == WeightType::float32) {
          write(panels + at, value);
        } else if (type == WeightType::bfloat16) {
          write(panels + at, to_bfloat16(value));
        } else {
          // A subnormal scale is less exact than its multiples.
          const float s = scale[size_t(row)], q = s > 0 ? std::nearbyint(value / s) : 0.0f;
          const auto rounded = int8_t(std::min(std::max(q, -127.0f), 127.0f));
          write(panels + at, rounded);
          if (!panel.has_sums()) return;
          auto* const sum = of_row(panel.sums_offset(), row);
          write(sum, read<int32_t>(sum) + rounded);
        }
      });
    }
    if (layer.has_projection) {
      auto* const projection = reinterpret_cast<float*>(to.at(d, to.panels_bytes()));
      const auto* const hr = w.hr.const_data_ptr<float>();
      for_each_in_gemm_panels(H, layer.P, block_units, [&](int64_t at, int64_t p, int64_t k) {
        projection[at] = hr[p * H + k];
      });
    }
    if (layer.has_bias) {
      auto* const kept =
          reinterpret_cast<float*>(to.at(d, to.panels_bytes() + to.projection_bytes()));
      const auto* const ih = w.bias_ih.const_data_ptr<float>();
      const auto* const hh = w.bias_hh.const_data_ptr<float>();
      std::memcpy(kept, ih, size_t(G * H) * sizeof(float));
      std::memcpy(kept + G * H, hh, size_t(G * H) * sizeof(float));
      for (int64_t row = 0; row < G * H; ++row) {
        const int64_t gate = row / H, unit = row % H;
        const auto add = [&](int64_t preact, float value) {
          auto* const bias = panels + to.place(0, preact, unit);
          write(bias, read<float>(bias) + value);
        };
        add(gate, ih[row]);
        add(cell.hidden_preact[size_t(gate)], hh[row]);
      }
    }
  }
  return to.packed_;
}

std::vector<Tensor> FrozenWeights::unfreeze() const {
  const scalar::PanelLayout panel = layout();
  const FrozenSizes& s = sizes();
  const int64_t G = panel.gates, H = s.H;
  const auto options = at::TensorOptions(at::kFloat);
  std::vector<Tensor> weights;
  for (int64_t d = 0; d < s.D; ++d) {
    const unsigned char* const panels = at(d, 0);
    for (int matrix = 0; matrix < 2; ++matrix) {
      const int64_t K = matrix ? s.P : s.I;
      weights.push_back(at::empty({G * H, K}, options));
      auto* const values = weights.back().mutable_data_ptr<float>();
      for_each_weight(matrix, [&](int64_t at, int64_t row, int64_t k) {
        float& value = values[row * K + k];
        if (type() == WeightType::float32) {
          value = read<float>(panels + at);
        } else if (type() == WeightType::bfloat16) {
          value = from_bfloat16(read<uint16_t>(panels + at));
        } else {
          const auto scale =
              read<float>(panels + place(panel.scales_offset(), matrix * G + row / H, row % H));
          value = float(read<int8_t>(panels + at)) * scale;
        }
      });
    }
    if (s.has_bias) {
      const auto* const kept =
          reinterpret_cast<const float*>(at(d, panels_bytes() + projection_bytes()));
      for (int64_t i = 0; i < 2; ++i) {
        weights.push_back(at::empty({G * H}, options));
        std::memcpy(weights.back().mutable_data_ptr(), kept + i * G * H,
                    size_t(G * H) * sizeof(float));
      }
    }
    if (s.has_projection) {
      weights.push_back(at::empty({s.P, H}, options));
      auto* const hr = weights.back().mutable_data_ptr<float>();
      const float* const from = projection(d);
      for_each_in_gemm_panels(H, s.P, block_units(),
                              [&](int64_t at, int64_t p, int64_t k) { hr[p * H + k] = from[at]; });
    }
  }
  return weights;
}

}  // namespace fusedrnn::cpu
