"""Mutation tests for the CUDA kernels, in the emulator without torch.

The kernels are right, also under ThreadSanitizer. Each bug here makes the program fail.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import re
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest
from helpers import emulated

pytestmark = pytest.mark.long  # many compilations, and ThreadSanitizer

KINDS = [
    ("Lstm", "BFloat16"),
    ("Gru", "float"),
    ("Gru", "Float16"),
    ("Lstm", "float"),
    ("RnnTanh", "BFloat16"),
    ("RnnRelu", "float"),
]


@dataclasses.dataclass(frozen=True)
class Bug:
    """A mutation: a text in a file and its replacement.

    Attributes:
        said: a pattern for the failure's report.
        kind: the cell and the type.
        sanitizer: whether only ThreadSanitizer finds it.
    """

    name: str
    file: str
    old: str
    new: str
    said: str
    kind: tuple[str, str] = ("Lstm", "BFloat16")
    sanitizer: bool = False


FORWARD = "csrc/cuda/persistent_forward.cuh"
BACKWARD = "csrc/cuda/persistent_backward.cuh"
KERNELS = "csrc/cuda/persistent_kernels.cuh"
EXCHANGE, GRID = "csrc/cuda/exchange.cuh", "csrc/cuda/exchange_grid.cuh"
CTA, CLUSTER = "csrc/cuda/exchange_cta.cuh", "csrc/cuda/exchange_cluster.cuh"
GEMM, STEP = "csrc/cuda/mma.cuh", "csrc/cuda/stepwise_kernels.cu"


def endless(algorithm: str, backward: str = "(_backward)?") -> str:
    """The error of a wait for another CTA that does not end, of an Lstm in BFloat16."""
    return (
        rf"fusedrnn: lstm{backward}, {algorithm}, BFloat16, hidden size \d+, batch \d+: "
        "a CTA waited 10 s for another CTA"
    )


BACKWARD, LENGTHS = "csrc/cuda/persistent_backward.cuh", "csrc/cuda/lengths.cuh"
ROWS, FUSED = "csrc/cuda/rows.cuh", "csrc/cuda/fused_step.cu"
AROUND = "csrc/cuda/layer_kernels.cu"
BUGS = [
    Bug(
        "values prefetched behind the last token",
        EXCHANGE,
        "if (at < unsigned(tokens_)) {",
        "if (at <= unsigned(tokens_)) {",
        "outside of a buffer",
    ),
    Bug(
        "units prefetched behind the last",
        EXCHANGE,
        "e.first_unit + unit < hidden_size &&",
        "",
        "outside of a buffer",
    ),
    Bug(
        "no wait for partial sums of other warps",
        EXCHANGE,
        "warp * Gemm::kScratchFloats);\n    sync_cta();",
        "warp * Gemm::kScratchFloats);",
        "wrong|data race",
        ("Gru", "float"),
        sanitizer=True,
    ),
    Bug(
        "partial sums written while others read them",
        GRID,
        "if constexpr (!Traits::kInFragments) sync_cta();",
        "",
        "data race",
        ("Gru", "float"),
        sanitizer=True,
    ),
    Bug(
        "no barrier between warps that trade their sums",
        EXCHANGE,
        "    sync_threads(1 + group(), kSplits * kWarp);\n",
        "",
        "wrong|data race",
        sanitizer=True,
    ),
    Bug(
        "sums traded through one buffer",
        EXCHANGE,
        "    buffer_ ^= kTraded * int(sizeof(Traded));",
        "    buffer_ ^= 0 * int(sizeof(Traded));",
        "data race",
        ("Gru", "float"),
        sanitizer=True,
    ),
    Bug(
        "no wait for the words of other CTAs",
        GRID,
        "if (largest_of_all == kMissing) {",
        "if (false) {",
        "wrong",
    ),
    Bug(
        "a wait for one word of four",
        GRID,
        "return larger(larger(w.word[0], w.word[1]), larger(w.word[2], w.word[3]));",
        "return w.word[2];",
        "wrong",
    ),
    Bug(
        "words that are never cleared",
        GRID,
        "store_relaxed(kMissing, word(k - 2, v));",
        "",
        "wrong",
    ),
    Bug(
        "words cleared while others still want them",
        GRID,
        "store_relaxed(kMissing, word(k - 2, v));",
        "store_relaxed(kMissing, word(k - 1, v));",
        endless("persistent_grid", ""),
    ),
    Bug(
        "words cleared just before they are stored again",
        GRID,
        "store_relaxed(kMissing, word(k - 2, v));",
        "store_relaxed(kMissing, word(k + 1, v));",
        "wrong",
    ),
    Bug(
        "no fence behind cleared words",
        GRID,
        "if (chunk + 1 == this->chunks() && k % kFenceSteps == 0) fence_device();",
        "",
        "wrong",
    ),
    Bug(
        "fences that are too far apart",
        GRID,
        "k % kFenceSteps == 0",
        "k % (3 * kFenceSteps) == 0",
        "wrong",
    ),
    Bug(
        "too few slots",
        GRID,
        "unsigned(k) % kExchangeSlots",
        "unsigned(k) % 2",
        "wrong|waited 10 s",
    ),
    Bug(
        "one slot for all steps",
        GRID,
        "unsigned(k) % kExchangeSlots",
        "unsigned(k) % 1",
        endless("persistent_grid", ""),
    ),
    Bug(
        "a wait for a slot that nobody fills",
        GRID,
        "PolledOperand<Operand>(slot(k) +",
        "PolledOperand<Operand>(slot(k + 1) +",
        endless("persistent_grid", "") + ".* in poll, line",
    ),
    Bug(
        "a store that is lost",
        GRID,
        "store_relaxed(words[v], word(k, v));",
        "if (blockIdx.x != 1 || k != 2) store_relaxed(words[v], word(k, v));",
        endless("persistent_grid", ""),
    ),
    Bug(
        "a store of the backward pass that is lost",
        GRID,
        "store_relaxed(words[v], word(k, v));",
        "if (kValues == 1 || v != 3 || k != 2) store_relaxed(words[v], word(k, v));",
        endless("persistent_grid", "_backward"),
    ),
    Bug(
        "a NaN that looks like a missing word",
        GRID,
        "return bits < kMissing ? bits : kMissing - 1;",
        "return bits;",
        "a CTA waited 10 s for another CTA",
        ("RnnRelu", "float"),
    ),
    Bug(
        "a wait for rows past the batch",
        GRID,
        "row < rows_ ? row : rows_ - 1",
        "row",
        endless("persistent_grid", ""),
    ),
    Bug(
        "a wait for units that no CTA has",
        GRID,
        "if (j < parts) to = load_relaxed",
        "to = load_relaxed",
        endless("persistent_grid", ""),
    ),
    Bug(
        "a wait for units that no CTA has, without tensor cores",
        GRID,
        "    if (first_k_ + k >= row_k_) return w;\n",
        "",
        "a CTA waited 10 s for another CTA",
        ("Gru", "float"),
    ),
    Bug(
        "operands in another order than the weights",
        GRID,
        "unit / n * n * kValues + v * n + unit % n",
        "v * (Traits::kK / kValues) + unit",
        "wrong|a CTA waited 10 s for another CTA",
    ),
    Bug(
        "the words of another row",
        GRID,
        "^ row_flip_, k); });",
        "^ row_flip_ ^ 1, k); });",
        "wrong",
    ),
    Bug(
        "one buffer of a cluster's exchange for all steps",
        CLUSTER,
        "k % 2 * buffer_stride_",
        "0 * buffer_stride_",
        "wrong|data race",
        sanitizer=True,
    ),
    Bug(
        "a warp's barrier that not all lanes reach",
        GEMM,
        "      sync_warp();\n      unroll<8>([&](auto part) {",
        "      if (lane < 31) sync_warp();\n      unroll<8>([&](auto part) {",
        "(deadlock|waited 10 s for another CTA).* in sync_warp, line|different places",
    ),
    Bug(
        "a thread leaves while others wait",
        FORWARD,
        "    load(t, 0, token);\n",
        "    load(t, 0, token);\n    if (threadIdx.x == 7) return;\n",
        "left the kernel",
    ),
    Bug(
        "CTAs that wait for each other and need not be resident",
        KERNELS,
        "grid.resident = plan.algorithm == Algorithm::persistent_grid;",
        "grid.resident = false;",
        endless("persistent_grid"),
    ),
    Bug(
        "rows past the batch",
        EXCHANGE,
        "return p.is_owned && p.tile_row < rows_ && first_unit",
        "return p.is_owned && first_unit",
        "outside of a buffer|wrong",
    ),
    Bug(
        "rows of the next tile",
        EXCHANGE,
        "kept(params.rows - first_row < params.tile_rows ? params.rows",
        "kept(true ? params.rows",
        "data race",
        sanitizer=True,
    ),
    Bug(
        "units past the layer",
        EXCHANGE,
        " && first_unit + p.unit < params_.hidden_size;",
        ";",
        "outside of a buffer|wrong",
    ),
    Bug(
        "shared memory that nobody has set",
        FORWARD,
        "        carried.at(chunk, i, kH) = h[i][0];\n",
        "",
        "wrong",
    ),
    Bug(
        "too little shared memory",
        KERNELS,
        "grid.shared = size_t(storage.bytes);",
        "grid.shared = size_t(storage.bytes) - 16;",
        "outside of a buffer|no address in shared memory",
    ),
    Bug(
        "padding of a cluster's CTA that nobody has cleared",
        CLUSTER,
        "operands_[i] = Operand{};",
        ";",
        "wrong",
    ),
    Bug(
        "rows of a fragment that change places",
        GEMM,
        "[group % 2 + i % 2 * 2] = w.word[i];",
        "[group % 2 * 2 + i % 2] = w.word[i];",
        "wrong",
    ),
    Bug(
        "half of a sum",
        GEMM,
        "if constexpr (kLanesPerRow == 2) sum += shuffle_xor(sum, 16);",
        "",
        "wrong",
        ("Gru", "float"),
    ),
    Bug(
        "rows staged while others still read the last",
        GEMM,
        "      sync_warp();\n    }\n  }",
        "    }\n  }",
        "data race",
        ("Gru", "float"),
        sanitizer=True,
    ),
    Bug(
        "one step too many for rows of some length",
        EXCHANGE,
        "length < params_.steps ? int(length) : params_.steps;",
        "length < params_.steps ? int(length) + 1 : params_.steps;",
        "wrong|outside of a buffer",
    ),
    Bug(
        "the forward order of time in both directions",
        EXCHANGE,
        "return direction ? params_.steps - 1 - i : i;",
        "return i;",
        "wrong|outside of a buffer",
    ),
    Bug(
        "threads past the last row",
        ROWS,
        "if (i >= rows * per_row) return {-1, 0};",
        "",
        "outside of a buffer|wrong",
    ),
    Bug(
        "wide accesses where there is no room for them",
        ROWS,
        "  return fit;",
        "  return true;",
        "outside of a buffer|wrong|misaligned",
    ),
    Bug(
        "wide accesses at odd addresses",
        ROWS,
        "fit &= reinterpret_cast<uintptr_t>(p) % (V * sizeof(T)) == 0;",
        "fit &= p != p + 1;",
        "misaligned",
    ),
    Bug(
        "rows of the exchange at odd addresses",
        CTA,
        "operand_stride<typename WorkTraits::Operand>(WorkTraits::kK);",
        "operand_stride<typename WorkTraits::Operand>(WorkTraits::kK) + 1;",
        "misaligned",
    ),
    Bug(
        "a gradient that is not carried past a row's end",
        STEP,
        "store(p.dh + at, active ? Vector<Accum, V>{} : dh);",
        "store(p.dh + at, Vector<Accum, V>{});",
        "wrong",
    ),
    Bug(
        "stores before all barriers are initialised",
        CLUSTER,
        "    sync_cluster();\n",
        "    sync_cta();\n",
        "was not initialised|data race|wrong",
        sanitizer=True,
    ),
    Bug(
        "no wait for a transaction barrier",
        CLUSTER,
        "at(k, chunk)->wait(unsigned(k) / 2 % 2, waiter);",
        "",
        "wrong|twice|more bytes|left the kernel",
    ),
    Bug(
        "a wait for the other phase of a barrier",
        CLUSTER,
        "wait(unsigned(k) / 2 % 2, waiter)",
        "wait((unsigned(k) / 2 + 1) % 2, waiter)",
        "wrong|twice|deadlock|waited 10 s|more bytes|left the kernel",
    ),
    Bug(
        "fewer bytes announced than sent",
        CLUSTER,
        "gridDim.x * Traits::kUnits * this->rows_of(chunk) * sizeof(Operand);",
        "(gridDim.x - 1) * Traits::kUnits * this->rows_of(chunk) * sizeof(Operand);",
        "more bytes|wrong|twice|deadlock|waited 10 s",
    ),
    Bug(
        "more bytes announced than sent",
        CLUSTER,
        "((this->rows_of(chunk) + 1) / 2) * 2",
        "((this->rows_of(chunk) + 3) / 2) * 2",
        endless("persistent_cluster") + ".* in wait, line",
    ),
    Bug(
        "bytes of one CTA that are never sent",
        CLUSTER,
        "        if (i < ctas) {",
        "        if (i < ctas && blockIdx.x != 1) {",
        endless("persistent_cluster", ""),
    ),
    Bug(
        "a barrier whose next bytes are not announced",
        CLUSTER,
        "if (threadIdx.x == 0 && k + 2 < steps_)",
        "if (threadIdx.x == 0 && k + 2 < 0)",
        endless("persistent_cluster") + ".* in wait, line",
    ),
    Bug(
        "one barrier for both buffers",
        CLUSTER,
        "return int(unsigned(k) % 2) * chunks_ + chunk;",
        "return chunk;",
        "twice|more bytes|deadlock|waited 10 s|wrong",
    ),
    Bug(
        "stores after the last step",
        CLUSTER,
        "    if (k == this->params_.steps) return;\n    Operand own;",
        "    Operand own;",
        "left the kernel|more bytes",
    ),
    Bug(
        "gradients multiplied before all are there",
        CLUSTER,
        "operands(k, chunk) + b_offset_;\n    sync_cta();",
        "operands(k, chunk) + b_offset_;",
        "wrong|data race",
        sanitizer=True,
    ),
    Bug(
        "gradients written while others multiply those of the step before",
        CLUSTER,
        "return operands_ + buffer(k, chunk) * Traits::kChunkRows",
        "return operands_ + chunk * Traits::kChunkRows",
        "wrong|data race",
        sanitizer=True,
    ),
    Bug(
        "two rows' partial dh that change places",
        CLUSTER,
        "is_swapped ? odd : even, is_swapped ? even : odd",
        "even, odd",
        "wrong",
        ("Gru", "float"),
    ),
    Bug(
        "partial dh sent to the wrong CTA",
        CLUSTER,
        "receiver_[i].exists ? cta : blockIdx.x;",
        "receiver_[i].exists ? cta ^ 1 : blockIdx.x;",
        "wrong|deadlock|waited 10 s|more bytes|outside",
    ),
    Bug(
        "words of a row that change places",
        CLUSTER,
        "4 * kPerWord * (4 * part + i) + lane_of_row_",
        "4 * kPerWord * (4 * part + (i ^ 1)) + lane_of_row_",
        "wrong",
        ("Gru", "float"),
    ),
    Bug(
        "padding that a step does not zero",
        ROWS,
        "if (has_token(p, row)) store_token({}, {});",
        "",
        "wrong y",
    ),
    Bug(
        "padding of GEMM operands that a step does not zero",
        STEP,
        "if (has_token(p, row)) store_operands(row, u, zeros, {}, {});",
        "",
        "wrong dgates",
    ),
    Bug(
        "padding that the persistent forward kernel does not zero",
        FORWARD,
        "if (!now_active[n] && e.exists(e.pair(chunk, n))) {",
        "if (false) {",
        "wrong y",
    ),
    Bug(
        "padding that the persistent backward kernel does not zero",
        BACKWARD,
        "if (!is_padding(e, results.t, length[n], results.chunk, n)) return;",
        "return;",
        "wrong dgates",
    ),
    Bug(
        "padding of the input that is kept",
        AROUND,
        "p.lengths[token % p.rows] <= token / p.rows",
        "p.lengths[token % p.rows] < token / p.rows",
        "wrong masked x",
    ),
    Bug(
        "no upper bound of lengths",
        LENGTHS,
        "length >= 0 && length <= steps",
        "length >= 0",
        "accepted a length of",
    ),
    Bug(
        "no lower bound of lengths",
        LENGTHS,
        "length >= 0 && length <= steps",
        "length <= steps",
        "accepted a length of -1",
    ),
    Bug(
        "lengths that the persistent kernel does not check",
        FORWARD,
        "if (params.lengths) check_length(",
        "if (false) check_length(",
        "accepted a length of",
    ),
    Bug(
        "lengths that the first step does not check",
        ROWS,
        "if (p.lengths) check_length(",
        "if (false) check_length(",
        "accepted a length of",
    ),
    Bug(
        "a cell state of the last active rows alone",
        ROWS,
        "if (p.c_n) store(",
        "if (p.c_n && active) store(",
        "wrong c_n",
    ),
    Bug(
        "h of an inactive row that is lost between the buffers",
        ROWS,
        "if (p.h_before != p.h) {",
        "if (false) {",
        "wrong",
    ),
    Bug(
        "a gradient through weight_hh before a row's last step",
        STEP,
        "if (row < p.product_rows) {",
        "if (!p.is_first) {",
        "wrong",
    ),
    Bug(
        "warps past the last unit",
        FUSED,
        "if (u >= p.hidden_size) return;",
        "",
        "outside of a buffer|wrong",
    ),
    Bug(
        "rows of a fused step that have no token",
        FUSED,
        "(row < p.rows ? row : p.rows - 1)",
        "row",
        "outside of a buffer",
    ),
    Bug(
        "wide loads past the end of K",
        FUSED,
        "k < of.K; k +=",
        "k <= of.K; k +=",
        "outside of a buffer|wrong|misaligned",
    ),
    Bug(
        "wide loads of any K",
        FUSED,
        "{p.h_before_stride, p.hidden_size}",
        "{}",
        "outside of a buffer|wrong|misaligned",
    ),
    Bug(
        "rows that change places in the sum over lanes",
        FUSED,
        "const bool upper = lane & kMask;",
        "const bool upper = !(lane & kMask);",
        "wrong",
    ),
    Bug(
        "lanes that the sum leaves out",
        FUSED,
        "sums[i] += shuffle_xor(sums[i], kMask);",
        "if (kMask > 1) sums[i] += shuffle_xor(sums[i], kMask);",
        "wrong",
    ),
    Bug(
        "tokens past the last in the biases' gradients",
        AROUND,
        "token < p.tokens;",
        "token <= p.tokens;",
        "outside of a buffer|wrong",
    ),
    Bug(
        "columns past the last in the biases' gradients",
        AROUND,
        "if (column < width) {",
        "if (true) {",
        "outside of a buffer|wrong",
    ),
    Bug(
        "no wait for the sums of other warps",
        AROUND,
        "    sync_cta();\n    if (int(threadIdx.x) >= kColumns",
        "    if (int(threadIdx.x) >= kColumns",
        "wrong",
    ),
    Bug(
        "partial dh of all CTAs but the last",
        CLUSTER,
        "[&](auto cta) { sum[cta] = at[cta * Traits::kPartials]; });",
        "[&](auto cta) { sum[cta] = cta + 1 < gridDim.x ? at[cta * Traits::kPartials] : 0; });",
        "wrong",
        ("Gru", "Float16"),
    ),
    Bug(
        "one buffer of received partial dh for all steps",
        CLUSTER,
        "received_ = buffer(k, chunk) * Traits::kChunkPartials",
        "received_ = chunk * Traits::kChunkPartials",
        "wrong|data race",
    ),
    Bug(
        "partial dh from CTAs that do not exist",
        CLUSTER,
        "cta * Traits::kPartials + threadIdx.x] = 0;",
        "cta * Traits::kPartials + threadIdx.x] = 1;",
        "wrong",
    ),
    Bug(
        "partial dh cleared while others load weights",
        CLUSTER,
        "    sync_cta();  // the partial dh",
        "    // the partial dh",
        "data race",
        sanitizer=True,
    ),
    Bug(
        "a backward barrier whose next bytes are not announced",
        CLUSTER,
        "if (k > 0) barriers_.expect_next",
        "if (k < 0) barriers_.expect_next",
        "(deadlock|waited 10 s)",
    ),
    Bug(
        "partial dh of a missing row pair",
        CLUSTER,
        "2 * int(threadIdx.x % 4) < this->rows_of(chunk);",
        "2 * int(threadIdx.x % 4) <= this->rows_of(chunk);",
        "more bytes|wrong|twice|left the kernel",
    ),
    Bug(
        "gradients of one CTA multiplied before all are there",
        CTA,
        "if (k < this->params_.steps) sync_cta();",
        "if (k < 0) sync_cta();",
        "wrong|data race",
        sanitizer=True,
    ),
    Bug(
        "gradients in the buffer that others multiply",
        CTA,
        "unsigned(k) % 2 * kBuffer",
        "0 * kBuffer",
        "wrong|data race",
        sanitizer=True,
    ),
    Bug(
        "half of the warps multiply the wrong buffer",
        BACKWARD,
        "e.multiply(gemm, n + 1, chunk, products);\n            unroll",
        "e.multiply(gemm, n, chunk, products);\n            unroll",
        "wrong",
    ),
    Bug(
        "saved values of the step before the one that is prepared",
        BACKWARD,
        "load(in, e, places, carried, next_chunk, next_t, back, next_token,",
        "load(in, e, places, carried, next_chunk, next_t, back, token,",
        "wrong|outside of a buffer",
    ),
    Bug(
        "the state after a step taken for the state before it",
        BACKWARD,
        "state_after[m] = in.state[m];",
        "",
        "wrong",
    ),
    Bug(
        "a look ahead of the first step",
        BACKWARD,
        "{ return unsigned(t) < length; }",
        "{ return t < int(length); }",
        "wrong|outside of a buffer",
    ),
    Bug(
        "the forward order of time in a reverse direction's gradients",
        BACKWARD,
        "back = e.direction ? 1 : -1;",
        "back = -1;",
        "wrong|outside of a buffer",
    ),
    Bug(
        "rows that start without their initial state",
        BACKWARD,
        "    if (!any) return;\n",
        "    return;\n",
        "wrong",
    ),
    Bug(
        "an inactive row's gradient that is not kept",
        BACKWARD,
        "carried.at(chunk, m, kDh) = active[m] ? 0 : dh[m];",
        "carried.at(chunk, m, kDh) = 0;",
        "wrong",
    ),
    Bug(
        "gradients of inactive rows",
        BACKWARD,
        "dgates[m][k] = active[m] ? dgates[m][k] : 0;",
        ";",
        "wrong",
    ),
    Bug(
        "the gradient of an inactive row's state",
        BACKWARD,
        "active[m] ? dstate[m] : dstate_after;",
        "dstate[m];",
        "wrong",
    ),
    Bug(
        "columns of weights read before all lanes have stored them",
        GEMM,
        "= now[i];\n      });\n      sync_warp();",
        "= now[i];\n      });",
        "data race|wrong",
        sanitizer=True,
    ),
    Bug(
        "columns of weights stored while other lanes read the last",
        GEMM,
        "      sync_warp();\n    });\n  }\n  /// The k of",
        "    });\n  }\n  /// The k of",
        "data race|wrong",
        sanitizer=True,
    ),
    Bug(
        "columns of a part that change places",
        GEMM,
        "i % 8 / 2 * 8 + i / 8 * 2 + i % 2;",
        "i % 8 / 2 * 8 + i / 8 * 2 + (i + 1) % 2;",
        "wrong",
    ),
    Bug(
        "operands of a unit and weights of another",
        EXCHANGE,
        "lane % 4 * 2 + lane % 8 / 4;",
        "lane % 8;",
        "wrong",
    ),
    Bug(
        "chains of which one is left out",
        GEMM,
        "if constexpr (kChains > 2) c[n][m][i] += other[2][n][m][i];",
        "",
        "wrong",
    ),
    Bug(
        "wide loads of weights at odd addresses",
        BACKWARD,
        "is_aligned(H % kPerWords<Element> == 0 &&",
        "is_aligned(H > 0 &&",
        "misaligned|wrong|outside",
    ),
    Bug(
        "rows of B in their own places where warps share K",
        EXCHANGE,
        "split() / 2 / kBlocks % kRowTiles * 8 + split() % 2;",
        "0 * (split() / 2 / kBlocks % kRowTiles * 8 + split() % 2);",
        "wrong",
    ),
    Bug(
        "blocks of A in their own places where warps share K",
        EXCHANGE,
        "return kSplits == 1 ? 0 : split() / 2 % kBlocks;",
        "return 0;",
        "wrong",
    ),
    Bug(
        "aligned weights past a row's end",
        GEMM,
        "load_words_if(k < end_, row_ + k)",
        "load_words_if(k <= end_, row_ + k)",
        "wrong|outside",
    ),
    Bug(
        "weights past a row's end",
        GEMM,
        "values[i] = k + i < end_ ?",
        "values[i] = k + i <= end_ ?",
        "wrong|outside",
    ),
    Bug(
        "unaligned weights by wide loads",
        FORWARD,
        "is_aligned(H % kPerWords<Element> == 0 &&",
        "is_aligned(H > 0 &&",
        "misaligned|wrong|outside",
    ),
    Bug(
        "other rows in the columns of B that few rows leave free",
        EXCHANGE,
        "lane / 8 % kChunkRows",
        "lane / 4 % kChunkRows",
        "wrong",
    ),
    Bug(
        "gate gradients of few rows in another unit's place",
        EXCHANGE,
        "pair(0, 0).unit / 8 % kBlocks * kParts",
        "pair(0, 0).unit / 8 % kBlocks * 0",
        "wrong",
    ),
    Bug(
        "a lane's scale of a row of which four lanes have a part",
        GEMM,
        "shuffle_xor(largest[0], 1 << i)",
        "shuffle_xor(largest[0], 1 << 0 * i)",
        "wrong",
        ("Lstm", "float"),
    ),
    Bug(
        "inputs in the forward order in both directions",
        FORWARD,
        "kept(e.direction ? -1 : 1)",
        "kept(1)",
        "wrong|outside of a buffer",
    ),
    Bug(
        "inputs of the step before",
        FORWARD,
        "load(t += next_time, 0, next_token);",
        "load(t += next_time, 0, token);",
        "wrong",
    ),
]


EMULATOR = "tests/emulator"
# The checking program's files. For each: whether ThreadSanitizer instruments it, and the mutated
# files it depends on. The emulator's own work must not be instrumented.
PARTS = {
    "check": (
        f"{EMULATOR}/check.cpp",
        True,
        {
            *(FORWARD, BACKWARD, KERNELS, EXCHANGE, CTA, GRID, CLUSTER, GEMM, LENGTHS),
            f"{EMULATOR}/emulator.h",
        },
    ),
    "step": (STEP, True, {STEP, ROWS, LENGTHS, f"{EMULATOR}/emulator.h"}),
    "fused": (FUSED, True, {FUSED, ROWS, LENGTHS, f"{EMULATOR}/emulator.h"}),
    "around": (AROUND, True, {AROUND, ROWS, f"{EMULATOR}/emulator.h"}),
    "plan": ("csrc/cuda/plan.cpp", False, set[str]()),
    "emulator": (f"{EMULATOR}/emulator.cpp", False, {f"{EMULATOR}/emulator.h"}),
}


# An exchange's file concerns one algorithm. Its kernels alone take a third of the compilation.
ONLY = {CTA: "persistent_cta", CLUSTER: "persistent_cluster", GRID: "persistent_grid"}


def compile_part(
    part: str, root: Path, kind: tuple[str, str], sanitizer: bool, only: str | None = None
) -> Path:
    """One part's object file, from the sources in `root`. only: an algorithm."""
    source, watched, _ = PARTS[part]
    flags = [*emulated.COMMON, "-O1", "-std=c++17", "-fno-tree-loop-distribute-patterns"]
    flags += emulated.ALIGNED
    flags += [f"-I{root / p}" for p in ("csrc/cuda", "csrc", EMULATOR)]
    flags += [f"-DFUSEDRNN_CELL={kind[0]}", f"-DFUSEDRNN_OPERAND={kind[1]}"]
    flags += ["-fsanitize=thread"] if sanitizer and watched else []
    flags += [f"-DFUSEDRNN_ONLY={only}"] if only else []
    output = Path(tempfile.mkdtemp(dir=root / "build")) / f"{part}.o"
    command = [*emulated.COMPILER, *flags, "-x", "c++", "-c", str(root / source)]
    subprocess.run([*command, "-o", str(output)], check=True)
    return output


class Builder:
    """Builds checking programs. Files without a mutation are compiled once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clean = folder / "clean"
        self.copy(self.clean)
        self.pool = concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        self.parts: dict[object, Path] = {}
        self.lock = threading.Lock()
        self.programs = {
            bug.name: self.pool.submit(self.planted, i, bug) for i, bug in enumerate(BUGS)
        }

    @staticmethod
    def copy(root: Path) -> None:
        for name in ("csrc", EMULATOR):
            shutil.copytree(emulated.ROOT / name, root / name)
        (root / "build").mkdir()

    def clean_part(self, part: str, kind: tuple[str, str], sanitizer: bool) -> Path:
        of_all = part in ("plan", "emulator")
        key = (part, *(() if of_all else (kind if part == "check" else (), sanitizer)))
        with self.lock:
            if key not in self.parts:
                self.parts[key] = compile_part(part, self.clean, kind, sanitizer)
            return self.parts[key]

    def program(
        self, root: Path, kind: tuple[str, str], sanitizer: bool, file: str | None = None
    ) -> Path:
        """The program for one cell and type; only `file` differs from the clean sources."""
        objects = [
            compile_part(part, root, kind, sanitizer, ONLY.get(file))
            if file in depends
            else self.clean_part(part, kind, sanitizer)
            for part, (_, _, depends) in PARTS.items()
        ]
        program = Path(tempfile.mkdtemp(dir=root / "build")) / "check"
        link = ["-fsanitize=thread"] if sanitizer else []
        command = [*emulated.COMPILER, *map(str, objects), *link, "-o", str(program)]
        subprocess.run(command, check=True)
        return program

    def planted(self, i: int, bug: Bug) -> Path:
        root = self.folder / str(i)
        self.copy(root)
        path = root / bug.file
        text = path.read_text()
        assert bug.old in text, f"the text of {bug.name!r} is no longer in {bug.file}"
        path.write_text(text.replace(bug.old, bug.new))
        return self.program(root, bug.kind, bug.sanitizer, bug.file)


def run(program: Path, seeds: int, left_out: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), str(seeds), left_out],
        env={**emulated.ENVIRONMENT, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


@pytest.fixture(scope="session")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Builder:
    return Builder(tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_right_as_they_are(kind: tuple[str, str], builder: Builder) -> None:
    result = run(builder.program(builder.clean, kind, False), 5)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("kind", KINDS[:2], ids="-".join)
def test_no_race(kind: tuple[str, str], builder: Builder) -> None:
    # A stepwise kernel's threads do not interact.
    result = run(builder.program(builder.clean, kind, True), 1, "stepwise")
    assert result.returncode == 0, result.stdout + result.stderr[:4000]
    assert "WARNING: ThreadSanitizer" not in result.stderr


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted(bug: Bug, builder: Builder) -> None:
    program = builder.programs[bug.name].result()
    result = run(program, 2, "stepwise") if bug.sanitizer else run(program, 10)
    said = result.stdout + result.stderr
    assert result.returncode != 0, f"not seen: {bug.name}"
    assert re.search(bug.said, said), said[:3000]
