// Host side of skinny_*.cuh: what it takes, how it cuts the work, its launches.
#include <algorithm>
#include <array>
#include <atomic>

#include "expert_linear/operands.h"
#include "expert_linear/skinny.h"
#include "expert_linear/skinny_across.cuh"
#include "expert_linear/skinny_down.cuh"
#include "expert_linear/skinny_host.h"

namespace fera::cuda {
namespace {

constexpr int kMaxDevices = 64;
constexpr int kMaxRank = 32;
constexpr int64_t kLeastGateRows = 16;  // a tile of `across` crosses at most one border of gate rows

struct Machine {
  int multiprocessors = 0, shared = 0, capability = 0;  // shared: bytes a block may have; capability: 90 for 9.0
  bool overlap = false;                                 // a kernel may start before the one before it has ended
};

// Asked once a device.
Machine machine() {
  static std::atomic<int64_t> known[kMaxDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMaxDevices) {
    cudaGetLastError();
    return {};
  }
  int64_t value = known[device].load(std::memory_order_relaxed);
  if (value == 0) {
    int sm = 0, shared = 0, major = 0, minor = 0;
    if (cudaDeviceGetAttribute(&sm, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
      cudaGetLastError();
      return {};
    }
    const bool overlap = overlap_wished() && waits(finish<Bfloat, 16, false>);
    value = static_cast<int64_t>(sm) << 40 | static_cast<int64_t>(shared) << 10 | (overlap ? 256 : 0) |
            (major * 10 + minor);
    known[device].store(value, std::memory_order_relaxed);
  }
  return {static_cast<int>(value >> 40), static_cast<int>(value >> 10 & 0x3fffffff), static_cast<int>(value & 0xff),
          (value & 256) != 0};
}

const char* refuses(const fera_experts& e, fera_dtype dtype) {
  if (dtype != FERA_BF16 && dtype != FERA_F16) return "x is not of 16 bits";
  if (stacked_of(e) > kMaxRank) return "experts * rank is above 32";
  if (e.in % 8 != 0 || e.out % 8 != 0) return "in or out is not a multiple of 8";
  for (const fera_dtype t : {e.a_dtype, e.b_dtype})
    if (t != FERA_F32 && t != dtype) return "A or B is neither float32 nor of x's dtype";
  if (e.rows_per_gate < kLeastGateRows) return "a gate row has fewer than 16 tokens";
  if (e.tokens > kMostTokens || std::max(e.in, e.out) > kMostColumns) return "tokens, in or out is above 2^28 or 2^24";
  if (!aligned(e.lora_a)) return "A is not aligned to 16 bytes";
  if (machine().capability < 80) return "the device is older than sm_80";
  return "";
}

// A: (R, in) -> k x rank of `down`, rank x column of dx; B: (out, R).
template <class T>
Weights<T> weights(const void* data, fera_dtype dtype, int64_t stride_i, int64_t stride_j, int64_t i, int64_t j) {
  return {data, dtype == FERA_F32, stride_i, stride_j, static_cast<int>(i), static_cast<int>(j)};
}

// `follows`: another kernel of the same call was launched just before, and this one waits for it itself.
template <class... Parameters, class... Arguments>
fera_status launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t bytes, cudaStream_t stream,
                   bool follows, Arguments&&... arguments) {
  if (bytes > 48 * 1024) {
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)) !=
        cudaSuccess)
      return launch_status("expert_update");
    // Else the first level cache may be left so much that two blocks do not fit.
    cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = follows && machine().overlap ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  return launch_status("expert_update");
}

// How `down` shares out its 16 warps: the columns go to `splits` of them.
struct DownCut {
  int splits, panel, blocks;
};

DownCut cut_down(const fera_experts& e, int rank, const Machine& m) {
  const int64_t columns = ceil_div(e.in, int64_t{64}) * 64;
  const int64_t room = (static_cast<int64_t>(m.shared) - static_cast<int64_t>(kDownWarps) * 16 * rank * 4) / (rank * 2);
  // Panels of equal width.
  const int64_t panels = ceil_div(columns, room / 64 * 64);
  const int64_t panel = ceil_div(columns, panels * 64) * 64;
  const int64_t adapter = stacked_of(e) * e.in * (e.a_dtype == FERA_F32 ? 4 : 2);
  DownCut best{};
  int64_t least = INT64_MAX;
  for (const int splits : {2, 4, 8, 16}) {
    const int64_t each = 16 * kDownWarps / splits, tiles = ceil_div(e.tokens, each);
    const int64_t blocks = std::min<int64_t>(tiles, m.multiprocessors), turns = ceil_div(tiles, blocks);
    // Of one multiprocessor; shares of the columns that do not come out even leave warps idle, and a turn has a tail.
    const int64_t width = ceil_div(columns, int64_t{64} * splits) * 64 * splits;
    const int64_t bytes = turns * (each * width * 2 + 10000) + (panels > 1 ? turns : 1) * adapter;
    if (bytes < least) {
      least = bytes;
      best = {splits, static_cast<int>(panel), static_cast<int>(blocks)};
    }
  }
  return best;
}

// The kernel for a number of splits, and with dropout or without.
template <class T, int kRank, bool kDrops>
auto down_kernel(int splits) {
  return splits == 2   ? down<T, kRank, 2, kDrops>
         : splits == 4 ? down<T, kRank, 4, kDrops>
         : splits == 8 ? down<T, kRank, 8, kDrops>
                       : down<T, kRank, 16, kDrops>;
}

template <class T, int kRank>
fera_status launch_down(const fera_expert_update_args& a, T* gated, bool follows, cudaStream_t stream) {
  const fera_experts& e = a.experts;
  const DownCut c = cut_down(e, kRank, machine());
  const auto kernel = e.dropout > 0 ? down_kernel<T, kRank, true>(c.splits) : down_kernel<T, kRank, false>(c.splits);
  return launch(kernel, dim3(static_cast<unsigned>(c.blocks)), kDownWarps * kWarp, down_bytes<kRank>(c.panel), stream,
                follows, RowsView<const T>{static_cast<const T*>(a.x.data), a.x.stride}, static_cast<int>(e.tokens),
                static_cast<int>(e.in), weights<T>(e.lora_a, e.a_dtype, e.in, 1, stacked_of(e), e.in), gates_of(e),
                static_cast<T*>(a.h), gated, c.panel, dropout_of(e));
}

// `sums` and `up` in one launch; v is (R, width). No rows of y: `sums` only. `dropped`: the experts whose dropout is
// the product's, or NULL.
template <class T, int kRank>
fera_status launch_finish(const ReduceArgs& sums, const T* gated, const Weights<T>& v, const fera_rows& base,
                          const fera_rows& y, int64_t tokens, int64_t width, const fera_experts* dropped,
                          cudaStream_t stream) {
  UpArgs<T> up{gated,
               v,
               {static_cast<const T*>(base.data), base.stride},
               {static_cast<T*>(y.data), y.stride},
               static_cast<int>(tokens),
               static_cast<int>(width),
               static_cast<int>(ceil_div(width, int64_t{kUpGroup})),
               0,
               0,
               {}};
  if (dropped != nullptr) up.dropout = dropout_of(*dropped);
  if (y.data != nullptr) {
    // Two blocks fit on a multiprocessor; V is read once a block.
    const int64_t tiles = ceil_div(tokens, int64_t{16});
    const int64_t slices = std::min<int64_t>(tiles, std::max<int64_t>(1, 2 * machine().multiprocessors / up.columns));
    up.tiles_per_slice = static_cast<int>(ceil_div(tiles, slices));
    up.blocks = up.columns * static_cast<int>(ceil_div<int64_t>(tiles, up.tiles_per_slice));
  }
  const int blocks = up.blocks + sums.blocks();
  if (blocks == 0) return FERA_OK;
  const auto kernel = dropped != nullptr && up.blocks > 0 ? finish<T, kRank, true> : finish<T, kRank, false>;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), kUpThreads, 0, stream, true, up, sums);
}

template <class T, int kRank>
fera_status forward(const fera_expert_update_args& a, const fera_context* context, bool with_up, bool follows) {
  const fera_experts& e = a.experts;
  const cudaStream_t stream = stream_of(context);
  T* gated = static_cast<T*>(context->workspace);
  FERA_RETURN_IF_ERROR((launch_down<T, kRank>(a, gated, follows, stream)));
  if (!with_up) return FERA_OK;
  return launch_finish<T, kRank>({}, gated, weights<T>(e.lora_b, e.b_dtype, 1, stacked_of(e), stacked_of(e), e.out),
                                 a.base, a.y, e.tokens, e.out, nullptr, stream);
}

// How `across` cuts a matrix: tokens of a tile, columns of a block, column blocks, slices of tiles.
struct Cut {
  int tile, columns, blocks, tiles, tiles_per_slice, slices;
  size_t bytes;
};

// The least time of the busiest multiprocessor, in bytes that pass through it.
Cut cut_across(const fera_experts& e, int64_t width, fera_dtype weights, int64_t longest, int64_t hidden_blocks,
               int rank, const Machine& m, bool first_pass) {
  const int64_t chunks = ceil_div(width, int64_t{64}),
                widest = (rank == 16 ? kAcrossColumns<16> : kAcrossColumns<32>) / 64;
  const int64_t stacked = stacked_of(e), per_column = stacked * (first_pass && weights == FERA_F32 ? 8 : 4);
  Cut best{};
  double least = 1e30;
  for (const int64_t tile : {128, 64, 32, 16}) {
    if (tile > std::max<int64_t>(16, longest)) continue;
    for (int64_t each = std::min(widest, chunks); each >= 1; --each) {
      const int64_t blocks = ceil_div(chunks, each), columns = each * 64;
      if (each > 1 && ceil_div(chunks, each - 1) == blocks) continue;  // as many blocks of fewer columns
      const auto bytes_of = rank == 16 ? across_bytes<16> : across_bytes<32>;
      const int64_t bytes =
          static_cast<int64_t>(bytes_of(static_cast<int>(tile), static_cast<int>(columns), first_pass));
      if (bytes <= m.shared) {
        const int64_t fit = std::min<int64_t>(2, (m.shared + 1024) / (bytes + 1024));  // two by registers
        const int64_t tiles = ceil_div(e.tokens, tile);
        const int64_t slices = std::min(tiles, std::max<int64_t>(1, fit * m.multiprocessors / blocks));
        const int64_t turns = ceil_div(tiles, slices), used = ceil_div(tiles, turns);
        const int64_t resident = ceil_div(blocks * used, int64_t{m.multiprocessors});
        const double rows = static_cast<double>(tile) * columns * 2;
        const double hidden =
            static_cast<double>(tile) * (first_pass ? stacked * 2 + rank * 4 : hidden_blocks * rank * 4);
        // A turn waits for its loads, unless another block computes meanwhile.
        const double wait = (turns - 1) * (resident > 1 ? 30e3 : 150e3);
        double time = resident * (turns * (rows + hidden) + columns * static_cast<double>(per_column)) + wait;
        // What comes after: `reduce` reads the slices, and about two column blocks of the second pass read all of dh,
        // waiting for it block by block.
        time += 4.0 * used * width * stacked / m.multiprocessors;
        if (first_pass) time += blocks * (2 * 4.0 * e.tokens * rank / m.multiprocessors + 15e3);
        if (time < least) {
          least = time;
          best = {static_cast<int>(tile),    static_cast<int>(columns), static_cast<int>(blocks),
                  static_cast<int>(tiles),   static_cast<int>(turns),   static_cast<int>(used),
                  static_cast<size_t>(bytes)};
        }
      }
    }
  }
  return best;
}

// The cuts of backward's two passes. A call asks for them several times, and the layers of a model are alike.
struct Cuts {
  Cut first, second;
};
Cuts cuts_of(const fera_experts& e, int rank) {
  const Machine m = machine();
  using Key = std::array<int64_t, 10>;
  const Key key{e.tokens,  e.in,      e.out,    e.experts,       e.rank,
                e.a_dtype, e.b_dtype, m.shared, e.rows_per_gate, m.multiprocessors};
  thread_local Key known{};
  thread_local Cuts cuts;
  if (key == known) return cuts;
  cuts.first = cut_across(e, e.out, e.b_dtype, 128, 0, rank, m, true);
  // Cut alike whatever is asked for: the order of the sums, and so their bits, do not depend on it.
  cuts.second = cut_across(e, e.in, e.a_dtype, e.rows_per_gate, cuts.first.blocks, rank, m, false);
  known = key;
  return cuts;
}

struct Layout {
  int rank;
  Cut first, second;
  float *hidden, *db, *da, *gate_sums;
  void* gated;
  size_t bytes;
  Layout(const fera_expert_update_backward_args& a, void* base) : rank(padded(a.experts)) {
    const fera_experts& e = a.experts;
    const int64_t stacked = stacked_of(e);
    const Cuts cuts = cuts_of(e, rank);
    first = cuts.first, second = cuts.second;
    if (!a.da) second.blocks = 1;
    Workspace workspace(base);
    hidden = workspace.take<float>(first.blocks * e.tokens * rank);
    db = workspace.take<float>(a.db ? first.slices * e.out * stacked : 0);
    da = workspace.take<float>(a.da ? second.slices * e.in * stacked : 0);
    gate_sums = workspace.take<float>(a.dgate ? int64_t{second.tiles} * 2 * rank : 0);
    gated = workspace.take<Half>(a.dx.data ? e.tokens * rank : 0);
    bytes = workspace.used();
  }
};

template <class T, int kRank>
fera_status backward(const fera_expert_update_backward_args& a, const fera_context* context, bool with_up,
                     bool follows) {
  const fera_experts& e = a.experts;
  const cudaStream_t stream = stream_of(context);
  const Layout l(a, context->workspace);
  const int stacked = static_cast<int>(stacked_of(e)), width = static_cast<int>(e.out), in = static_cast<int>(e.in);
  T* gated = static_cast<T*>(l.gated);

  AcrossArgs<T> args{};
  args.tokens = static_cast<int>(e.tokens);
  args.gates = gates_of(e);
  args.h = static_cast<const T*>(a.h);
  args.b = weights<T>(e.lora_b, e.b_dtype, stacked, 1, width, stacked);
  args.hidden = l.hidden;
  args.hidden_blocks = l.first.blocks;
  const bool drops = e.dropout > 0;
  args.dropout = dropout_of(e);
  const auto pass = [&](auto kernel, const Cut& c, bool after) {
    args.columns = c.columns;
    args.tile = c.tile;
    args.tiles = c.tiles;
    args.tiles_per_slice = c.tiles_per_slice;
    return launch(kernel, dim3(static_cast<unsigned>(c.blocks), static_cast<unsigned>(c.slices)), kAcrossWarps * kWarp,
                  c.bytes, stream, after, args);
  };
  args.x = {static_cast<const T*>(a.dy.data), a.dy.stride};
  args.width = width;
  args.partial = a.db ? l.db : nullptr;
  FERA_RETURN_IF_ERROR(pass(across<T, kRank, true, false>, l.first, follows));
  if (a.dx.data || a.da || a.dgate) {
    args.x = {static_cast<const T*>(a.x.data), a.x.stride};
    args.width = a.da ? in : 0;
    args.gated = a.dx.data ? gated : nullptr;
    args.gate_sums = a.dgate ? l.gate_sums : nullptr;
    args.partial = a.da ? l.da : nullptr;
    const auto kernel = drops ? across<T, kRank, false, true> : across<T, kRank, false, false>;
    FERA_RETURN_IF_ERROR(pass(kernel, l.second, true));
  }
  const ReduceArgs sums = reduce_of(a, {l.da, l.db, l.gate_sums, l.second.slices, l.first.slices, l.second.tile});
  const fera_rows none{nullptr, a.dx.dtype, 0};
  return launch_finish<T, kRank>(sums, gated, weights<T>(e.lora_a, e.a_dtype, e.in, 1, stacked, e.in),
                                 a.add_to_dx ? a.dx : none, with_up ? a.dx : none, e.tokens, e.in, drops ? &e : nullptr,
                                 stream);
}

// f(T, rank tag) for the 16-bit dtype and the padded rank.
template <class F>
fera_status with_types(fera_dtype dtype, int rank, F f) {
  using Small = std::integral_constant<int, 16>;
  using Large = std::integral_constant<int, 32>;
  if (dtype == FERA_BF16) return rank == 16 ? f(Bfloat{}, Small{}) : f(Bfloat{}, Large{});
  return rank == 16 ? f(Half{}, Small{}) : f(Half{}, Large{});
}

}  // namespace

const char* skinny_refuses(const fera_expert_update_args& a) {
  const char* why = refuses(a.experts, a.x.dtype);
  if (*why != 0) return why;
  if (!fits(a.x) || (a.weight.data == nullptr && !fits(a.base)) || !fits(a.y))
    return "rows of x, base or y are not aligned to 16 bytes";
  return "";
}

const char* skinny_refuses(const fera_expert_update_backward_args& a) {
  const char* why = refuses(a.experts, a.x.dtype);
  if (*why != 0) return why;
  if (!fits(a.x) || !fits(a.dy) || !fits(a.dx)) return "rows of x, dy or dx are not aligned to 16 bytes";
  return "";
}

size_t skinny_workspace(const fera_expert_update_args& a) {
  return static_cast<size_t>(a.experts.tokens) * padded(a.experts) * 2;
}
size_t skinny_workspace(const fera_expert_update_backward_args& a) { return Layout(a, nullptr).bytes; }

namespace {

fera_status run(const fera_expert_update_args& a, const fera_context* context, bool with_up, bool follows) {
  return with_types(a.x.dtype, padded(a.experts), [&](auto type, auto rank) {
    return forward<decltype(type), decltype(rank)::value>(a, context, with_up, follows);
  });
}
fera_status run(const fera_expert_update_backward_args& a, const fera_context* context, bool with_up, bool follows) {
  return with_types(a.x.dtype, padded(a.experts), [&](auto type, auto rank) {
    return backward<decltype(type), decltype(rank)::value>(a, context, with_up, follows);
  });
}

}  // namespace

fera_status skinny_before(const fera_expert_update_args& a, bool follows, const fera_context* context) {
  return run(a, context, false, follows);
}
fera_status skinny_before(const fera_expert_update_backward_args& a, bool follows, const fera_context* context) {
  return run(a, context, false, follows);
}
const void* skinny_gated(const fera_expert_update_args&, void* workspace) { return workspace; }
const void* skinny_gated(const fera_expert_update_backward_args& a, void* workspace) {
  return a.dx.data ? Layout(a, workspace).gated : nullptr;
}

fera_status skinny_launch(const fera_expert_update_args& a, const fera_context* context) {
  return run(a, context, true, false);
}
fera_status skinny_launch(const fera_expert_update_backward_args& a, const fera_context* context) {
  return run(a, context, true, false);
}

}  // namespace fera::cuda
