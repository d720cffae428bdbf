// Host side of fused.cuh: what it takes, the tile it takes for a size, tensor maps, launches.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "expert_linear/fused.cuh"
#include "expert_linear/fused.h"
#include "expert_linear/fused_host.h"
#include "expert_linear/fused_pack.cuh"
#include "expert_linear/fused_sums.h"
#include "expert_linear/operands.h"
#include "expert_linear/skinny.h"
#include "expert_linear/wide.h"

namespace fera::cuda {
namespace {

template <int kN, bool kNMajor, int kCluster, int kInside>
bool encode(FusedMaps* maps, int i, const Product& p) {
  const fera_dtype t = p.x.dtype;
  const int64_t stride = p.weight.stride;
  constexpr int kShare = kN / kCluster;
  return encode_rows(&maps->x[i], t, p.x.data, p.depth, p.rows, p.x.stride, 64, kFusedRows) &&
         (kInside == 0 ? encode_rows(&maps->u[i], t, p.u, p.rank, p.rows, p.rank, 64, kFusedRows)
          : kNMajor    ? encode_rows(&maps->u[i], t, p.inside.a, kInside, p.depth, kInside, 64, kFusedDepth)
                       : encode_rows(&maps->u[i], t, p.inside.a, p.depth, kInside, p.depth, 64, kInside)) &&
         encode_rows(&maps->y[i], t, p.y.data, p.columns, p.rows, p.y.stride, 32, 64) &&
         (kNMajor ? encode_rows(&maps->w[i], t, p.weight.data, p.columns, p.depth, stride, 64, 64) &&
                        encode_rows(&maps->v[i], t, p.v, p.columns, p.rank, p.columns, 64, 64)
                  : encode_rows(&maps->w[i], t, p.weight.data, p.depth, p.columns, stride, 64, kShare) &&
                        encode_rows(&maps->v[i], t, p.v, p.rank, p.columns, p.rank, 64, kShare));
}

template <class T, int kN, bool kNMajor, int kCluster, int kInside = 0>
fera_status launch(const char* op, const Products& p, bool follows, cudaStream_t stream) {
  using Size = FusedSize<kN, kNMajor, kInside>;
  FusedMaps maps;
  FusedShape<T> shape{};
  shape.members = p.members;
  shape.summed = p.summed;
  for (int i = 0; i < p.members; ++i) {
    const Product& m = p.member[i];
    if (!encode<kN, kNMajor, kCluster, kInside>(&maps, i, m)) {
      set_last_error(std::string(op) + ": " + fera_last_error());
      return FERA_CUDA_ERROR;
    }
    shape.bias[i] = static_cast<const T*>(m.bias);
    shape.columns[i] = static_cast<int>(m.columns);
    shape.first_tile[i] = p.summed ? 0 : shape.column_tiles;
    shape.blocks[i] = static_cast<int>(ceil_div(m.depth, int64_t{kFusedDepth}));
    shape.rank_steps[i] = ceil_div(m.rank, 16);
    const Inside& in = m.inside;
    shape.hidden[i] = {in.gate, in.rows_per_gate, in.experts, in.each, in.scale, in.h};
    if (i == 0 || !p.summed) shape.column_tiles += static_cast<int>(ceil_div(m.columns, int64_t{kN}));
  }
  shape.rows = static_cast<int>(p.member[0].rows);
  shape.row_tiles = static_cast<int>(ceil_div(p.member[0].rows, int64_t{kFusedRows * kCluster}));
  shape.tiles = shape.row_tiles * shape.column_tiles;
  const auto kernel = fused_product<T, kN, kNMajor, kCluster, kInside>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Size::bytes);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = kCluster;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(std::min(hopper() / kCluster, shape.tiles) * kCluster);
  config.blockDim = dim3(kFusedThreads);
  config.dynamicSmemBytes = Size::bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = follows && overlap_wished() ? 2 : 1;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, maps, shape);
  return launch_status(op);
}

// Widths of tiles there are kernels for.
template <int kCluster, bool kInside, bool kNMajor>
struct Widths {
  using type = std::integer_sequence<int, 192, 160>;
};
template <bool kNMajor>
struct Widths<2, false, kNMajor> {
  using type = std::integer_sequence<int, 256, 224, 192, 160, 128>;
};
template <>
struct Widths<2, true, false> {  // an instruction has at most 256 columns, those of h with them
  using type = std::integer_sequence<int, 224, 192, 160, 128>;
};
template <int kCluster>
struct Widths<kCluster, true, true> {
  using type = std::integer_sequence<int, 192, 128>;
};

// Of the widths the one that takes least time by the waves of blocks it makes. A wave took 1.05 us and 4.8e-5 us for
// each column and each number along k (H200, 128 rows, K 640 and 3072, five widths).
template <int... kWidths>
int tile_columns(const Products& p, int cluster, int inside, std::integer_sequence<int, kWidths...>) {
  const char* wish = std::getenv("FERA_EXPERT_TILE");  // for tests and timings: a width, where there is one
  const int forced = wish == nullptr ? 0 : std::atoi(wish);
  int best = 0;
  double least = 1e30;
  const int64_t rows = ceil_div(p.member[0].rows, int64_t{cluster} * kFusedRows);
  double depth = static_cast<double>(p.member[0].depth);
  for (int i = 1; i < p.members && p.summed; ++i) depth += static_cast<double>(p.member[i].depth);
  for (const int width : {kWidths...}) {
    int64_t tiles = 0;
    for (int i = 0; i < (p.summed ? 1 : p.members); ++i) tiles += rows * ceil_div(p.member[i].columns, int64_t{width});
    const double waves = static_cast<double>(ceil_div(tiles, int64_t{hopper() / cluster}));
    const double time = waves * (1.05 + 4.8e-5 * (width + inside) * depth);
    if (width == forced) return width;
    if (time < least) best = width, least = time;
  }
  return best;
}

template <class T, bool kNMajor, int kCluster, int kInside, int... kWidths>
fera_status launch_width(const char* op, const Products& p, bool follows, cudaStream_t stream,
                         std::integer_sequence<int, kWidths...> widths) {
  const int columns = tile_columns(p, kCluster, kInside, widths);
  fera_status status = FERA_OK;
  ((columns == kWidths && (status = launch<T, kWidths, kNMajor, kCluster, kInside>(op, p, follows, stream), true)) ||
   ...);
  return status;
}

// f(std::integral_constant) for one of two values.
template <int kFirst, int kSecond, class F>
fera_status either(bool first, F f) {
  return first ? f(std::integral_constant<int, kFirst>{}) : f(std::integral_constant<int, kSecond>{});
}

template <class T>
fera_status launch_products(const char* op, const Products& p, bool follows, cudaStream_t stream) {
  const Product& first = p.member[0];
  // Where the loop over k is short, two blocks that wait for each other cost more than the loads they share.
  return either<1, 2>(first.depth <= 384, [&](auto cluster) {
    return either<1, 0>(first.n_major, [&](auto n_major) {
      constexpr int kCluster = decltype(cluster)::value;
      constexpr bool kNMajor = decltype(n_major)::value != 0;
      using Outside = typename Widths<kCluster, false, kNMajor>::type;
      using With = typename Widths<kCluster, true, kNMajor>::type;
      if (first.inside.a == nullptr) return launch_width<T, kNMajor, kCluster, 0>(op, p, follows, stream, Outside{});
      return either<16, 32>(first.rank == 16, [&](auto rank) {
        return launch_width<T, kNMajor, kCluster, decltype(rank)::value>(op, p, follows, stream, With{});
      });
    });
  });
}

const char* refuses(const fera_rows& weight, int64_t width) {
  if (weight.data == nullptr) return "the base product is not asked for";
  if (std::strstr(fera_cuda_targets(), "90a") == nullptr) return "the build has no kernels for sm_90a";
  if (hopper() == 0) return "the device is not of sm_90";
  if (encoder() == nullptr) return "the driver knows no tensor maps";
  if (reinterpret_cast<uintptr_t>(weight.data) % 16 != 0 || weight.stride % 8 != 0 || weight.stride < width)
    return "rows of the weight are not aligned to 16 bytes";
  return "";
}
bool repeats(const fera_rows& r, int64_t width) { return r.stride < width; }  // a tensor map has no stride of 0

// The workspace of a narrow call: what the skinny products want, A and B in x's dtype.
template <class Args>
struct FusedLayout {
  char* skinny;
  void *a16, *b16;
  size_t bytes;
  FusedLayout(const Args& args, size_t skinny_bytes, void* base) {
    const fera_experts& e = args.experts;
    Workspace workspace(base);
    skinny = workspace.take<char>(static_cast<int64_t>(skinny_bytes));
    a16 = workspace.take<Half>(e.in * padded(e));
    b16 = workspace.take<Half>(e.out * padded(e));
    bytes = workspace.used();
  }
};
FusedLayout<fera_expert_update_args> layout(const fera_expert_update_args& a, bool inside, void* base) {
  return {a, inside ? 0 : skinny_workspace(a), base};
}
FusedLayout<fera_expert_update_backward_args> layout(const fera_expert_update_backward_args& a, bool inside,
                                                     void* base) {
  return {a, inside ? sums_workspace(a) : skinny_workspace(a), base};
}

// A as (rank, in) and B as (out, rank), in x's dtype.
Pack pack_a(const fera_experts& e, void* to) {
  const int in = static_cast<int>(e.in);
  return {e.lora_a, e.a_dtype == FERA_F32, e.in, e.experts * e.rank, in, padded(e), in, to};
}
Pack pack_b(const fera_experts& e, void* to) {
  const int out = static_cast<int>(e.out), stacked = e.experts * e.rank;
  return {e.lora_b, e.b_dtype == FERA_F32, stacked, out, stacked, out, padded(e), to};
}

Inside inside_of(const fera_experts& e, const void* narrow, void* h) {
  return {narrow,
          static_cast<const float*>(e.gate),
          static_cast<int>(e.rows_per_gate),
          e.experts,
          e.rank,
          static_cast<float>(e.scale),
          h};
}

// The product of a call and the weights to pack for it; u where its own kernel will write it.
void plan(const fera_expert_update_args& a, bool inside, void* workspace, Packs* packs, Product* p) {
  const fera_experts& e = a.experts;
  const auto l = layout(a, inside, workspace);
  *p = {a.x, a.weight, a.y, false, a.bias, nullptr, l.b16, e.tokens, e.out, e.in, padded(e), {}};
  packs->piece[packs->pieces++] = pack_b(e, l.b16);
  if (inside) {
    packs->piece[packs->pieces++] = pack_a(e, l.a16);
    p->inside = inside_of(e, l.a16, a.h);
  } else {
    p->u = skinny_gated(a, l.skinny);
  }
}
void plan(const fera_expert_update_backward_args& a, bool inside, void* workspace, Packs* packs, Product* p) {
  const fera_experts& e = a.experts;
  const auto l = layout(a, inside, workspace);
  *p = {a.dy, a.weight, a.dx, true, nullptr, nullptr, l.a16, e.tokens, e.in, e.out, padded(e), {}};
  if (a.dx.data != nullptr) packs->piece[packs->pieces++] = pack_a(e, l.a16);
  if (inside) {
    packs->piece[packs->pieces++] = pack_b(e, l.b16);
    p->inside = inside_of(e, l.b16, sums_hidden(a, l.skinny));
  } else {
    p->u = skinny_gated(a, l.skinny);
  }
}

// The kernels that make u, where the product does not.
template <class Args>
fera_status before(const Args& a, void* workspace, bool follows, const fera_context* context) {
  fera_context own = *context;
  own.workspace = layout(a, false, workspace).skinny;
  return skinny_before(a, follows, &own);
}

}  // namespace

fera_status launch_products(const char* op, const Products& p, bool follows, cudaStream_t stream) {
  return p.member[0].x.dtype == FERA_BF16 ? launch_products<Bfloat>(op, p, follows, stream)
                                          : launch_products<Half>(op, p, follows, stream);
}

const char* fused_refuses(const fera_expert_update_args& a) {
  if (a.experts.dropout > 0) return "dropout is asked for";  // x goes from memory to the tensor cores untouched
  const char* why = wide_ranks(a.experts) ? wide_refuses(a) : skinny_refuses(a);
  if (*why == 0) why = refuses(a.weight, a.experts.in);
  if (*why == 0 && repeats(a.x, a.experts.in)) why = "rows of x repeat";
  if (*why == 0 && reinterpret_cast<uintptr_t>(a.bias) % 4 != 0) why = "the bias is not aligned to 4 bytes";
  return why;
}
const char* fused_refuses(const fera_expert_update_backward_args& a) {
  if (a.experts.dropout > 0) return "dropout is asked for";  // x goes from memory to the tensor cores untouched
  const char* why = wide_ranks(a.experts) ? wide_refuses(a) : skinny_refuses(a);
  if (*why == 0) why = refuses(a.weight, a.experts.in);
  if (*why == 0 && repeats(a.dy, a.experts.out)) why = "rows of dy repeat";
  return why;
}

// Inside, h costs its share of the product, again in every column tile of about 200. Outside it is a kernel of its own,
// 5 us and a read of x at 2.8 TB/s.
bool fused_inside(const fera_expert_update_args& a) {
  const char* forced = std::getenv("FERA_EXPERT_INSIDE");  // for tests and timings: 0 or 1
  if (forced != nullptr && *forced != 0) return *forced == '1';
  const fera_experts& e = a.experts;
  const double x = static_cast<double>(e.tokens) * static_cast<double>(e.in);
  return 2 * x * static_cast<double>(e.out) * padded(e) / 200 / 7e14 < 5e-6 + 2 * x / 2.8e12;
}

// Backward, inside saves a pass over dy and the wait between three kernels, about 10 us; its tiles are narrower than
// the best, which costs more the more the product does (H200: it wins by 7 to 10 us at 16384 x 640 x 640 and 4096 x
// 1280 x 1280, and loses 18 of 360 us at 16384 x 2432 x 2432).
bool fused_inside(const fera_expert_update_backward_args& a) {
  const fera_experts& e = a.experts;
  if (a.dx.data == nullptr || !sums_take(e) || repeats(a.x, e.in)) return false;
  const char* forced = std::getenv("FERA_EXPERT_INSIDE");
  if (forced != nullptr && *forced != 0) return *forced == '1';
  const double product = static_cast<double>(e.tokens) * static_cast<double>(e.out) * static_cast<double>(e.in);
  return 2 * product * padded(e) / 192 / 7e14 < 5e-6;
}

size_t fused_workspace(const fera_expert_update_args& a, bool inside) { return layout(a, inside, nullptr).bytes; }
size_t fused_workspace(const fera_expert_update_backward_args& a, bool inside) {
  return layout(a, inside, nullptr).bytes;
}
size_t fused_workspace(const fera_expert_update_args& a) {
  return wide_ranks(a.experts) ? wide_workspace(a) : fused_workspace(a, fused_inside(a));
}
size_t fused_workspace(const fera_expert_update_backward_args& a) {
  return wide_ranks(a.experts) ? wide_workspace(a) : fused_workspace(a, fused_inside(a));
}

fera_status fused_members(const char* op, int members, const Call<fera_expert_update_args>* calls, bool inside,
                          const fera_context* context) {
  const cudaStream_t stream = stream_of(context);
  Packs packs{};
  Products products{members, false, {}};
  for (int i = 0; i < members; ++i) plan(*calls[i].args, inside, calls[i].workspace, &packs, &products.member[i]);
  launch_pack(products.member[0].x.dtype, packs, stream);
  for (int i = 0; i < members && !inside; ++i)
    FERA_RETURN_IF_ERROR(before(*calls[i].args, calls[i].workspace, true, context));
  return launch_products(op, products, true, stream);
}

fera_status fused_members(const char* op, int members, const Call<fera_expert_update_backward_args>* calls, bool inside,
                          const fera_context* context) {
  const cudaStream_t stream = stream_of(context);
  Packs packs{};
  Products products{members, true, {}};
  const fera_expert_update_backward_args* args[FERA_MAX_GROUP];
  void* sums[FERA_MAX_GROUP];
  for (int i = 0; i < members; ++i) {
    args[i] = calls[i].args;
    sums[i] = layout(*args[i], inside, calls[i].workspace).skinny;
    plan(*args[i], inside, calls[i].workspace, &packs, &products.member[i]);
  }
  const bool packed = packs.pieces > 0;
  if (packed) launch_pack(products.member[0].x.dtype, packs, stream);
  for (int i = 0; i < members && !inside; ++i)
    FERA_RETURN_IF_ERROR(before(*args[i], calls[i].workspace, packed || i > 0, context));
  if (products.member[0].y.data == nullptr) return launch_status(op);
  FERA_RETURN_IF_ERROR(launch_products(op, products, true, stream));
  return inside ? launch_sums(op, members, args, sums, stream) : FERA_OK;
}

fera_status fused_launch(const fera_expert_update_args& a, const fera_context* context) {
  const char* op = "expert_update";
  const fera_experts& e = a.experts;
  if (!wide_ranks(e)) {
    const Call<fera_expert_update_args> call{&a, context->workspace};
    return fused_members(op, 1, &call, fused_inside(a), context);
  }
  LowRank term{};
  FERA_RETURN_IF_ERROR(wide_down(a, context, &term));
  const Product product{a.x, a.weight, a.y, false, a.bias, term.u, term.v, e.tokens, e.out, e.in, term.rank, {}};
  return launch_products(op, {1, false, {product}}, true, stream_of(context));
}

fera_status fused_launch(const fera_expert_update_backward_args& a, const fera_context* context) {
  const char* op = "expert_update_backward";
  const fera_experts& e = a.experts;
  if (!wide_ranks(e)) {
    const Call<fera_expert_update_backward_args> call{&a, context->workspace};
    return fused_members(op, 1, &call, fused_inside(a), context);
  }
  LowRank term{};
  FERA_RETURN_IF_ERROR(wide_across(a, context, &term));
  if (a.dx.data == nullptr) return FERA_OK;
  const Product product{a.dy, a.weight, a.dx, true, nullptr, term.u, term.v, e.tokens, e.in, e.out, term.rank, {}};
  return launch_products(op, {1, false, {product}}, true, stream_of(context));
}

}  // namespace fera::cuda
