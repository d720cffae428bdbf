// Host side of fused_sums.cuh: how the passes share the machine, their launches.
#include <algorithm>
#include <string>

#include "expert_linear/fused_host.h"
#include "expert_linear/fused_sums.cuh"
#include "expert_linear/fused_sums.h"
#include "expert_linear/skinny_host.h"

namespace fera::cuda {
namespace {

using Args = fera_expert_update_backward_args;

// How a matrix (T, width) is cut: columns of a block, column blocks, slices of tiles of 32 tokens.
struct Cut {
  int columns, blocks, tiles, tiles_per_slice, slices, stages;
  // `all`: the widths of all matrices that are read at once; each has the multiprocessors of its share.
  Cut(const fera_experts& e, int64_t width, int64_t all) {
    const int64_t widest = padded(e) == 16 ? kSumsColumns<16> : kSumsColumns<32>;
    const int64_t each = ceil_div(ceil_div(width, ceil_div(width, widest)), int64_t{64}) * 64;
    columns = static_cast<int>(each);
    blocks = static_cast<int>(ceil_div(width, each));
    tiles = static_cast<int>(ceil_div(e.tokens, int64_t{kSumsTokens}));
    const int64_t slots = hopper() * width / all / blocks;
    tiles_per_slice = static_cast<int>(ceil_div(int64_t{tiles}, std::clamp<int64_t>(slots, 1, tiles)));
    slices = ceil_div(tiles, tiles_per_slice);
    stages = std::min(kSumsStages, kSumsRing / (columns / 64 * kSumsBox));
  }
};

struct Layout {
  float *hidden, *db, *da, *gate_sums;
  size_t bytes;
  Layout(const Args& a, void* base) {
    const fera_experts& e = a.experts;
    // Alone it has the most slices.
    const Cut dy(e, e.out, e.in + e.out), x(e, e.in, e.in + e.out);
    Workspace workspace(base);
    hidden = workspace.take<float>(a.da || a.dgate ? e.tokens * padded(e) : 0);
    db = workspace.take<float>(a.db ? dy.slices * e.out * stacked_of(e) : 0);
    da = workspace.take<float>(a.da ? x.slices * e.in * stacked_of(e) : 0);
    gate_sums = workspace.take<float>(a.dgate ? int64_t{x.tiles} * 2 * padded(e) : 0);
    bytes = workspace.used();
  }
};

template <class T>
SumsJob<T> job_of(const Args& a, const Cut& c, int64_t width, bool with_sums) {
  const fera_experts& e = a.experts;
  SumsJob<T> job{};
  job.h = static_cast<const T*>(a.h);
  job.gates = gates_of(e);
  job.tokens = static_cast<int>(e.tokens);
  job.width = static_cast<int>(width);
  job.columns = c.columns;
  job.blocks = with_sums ? c.blocks : 1;
  job.tiles = c.tiles;
  job.tiles_per_slice = c.tiles_per_slice;
  job.stages = c.stages;
  job.count = job.blocks * c.slices;
  return job;
}

template <class Kernel, class... Parameters>
fera_status launch(const char* op, Kernel kernel, int blocks, int threads, int bytes, cudaStream_t stream,
                   const Parameters&... parameters) {
  cudaError_t error = cudaSuccess;
  if (bytes > 0) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap_wished() ? 1 : 0;
  if (error == cudaSuccess) cudaLaunchKernelEx(&config, kernel, parameters...);
  return launch_status(op);
}

template <class T, int kRank>
fera_status run(const char* op, int members, const Args* const* member, void* const* workspace, cudaStream_t stream) {
  SumsMaps maps{};
  SumsArgs<T> args{};
  ReduceAllArgs reduce{};
  reduce.members = members;
  int64_t all = 0;
  for (int i = 0; i < members; ++i) all += member[i]->experts.in + member[i]->experts.out;
  int blocks = 0, reduce_blocks = 0;
  const auto add = [&](const fera_rows& rows, const SumsJob<T>& job) {
    blocks += job.count;
    CUtensorMap* map = &maps.rows[args.jobs];
    args.job[args.jobs++] = job;
    if (encode_rows(map, rows.dtype, rows.data, job.width, job.tokens, rows.stride, 64, kSumsTokens)) return true;
    set_last_error(std::string(op) + ": " + fera_last_error());
    return false;
  };
  // dy's passes first: they need nothing of the kernel before.
  for (int i = 0; i < members; ++i) {
    const Args& a = *member[i];
    const fera_experts& e = a.experts;
    if (a.db == nullptr) continue;
    const Cut cut(e, e.out, all);
    SumsJob<T> job = job_of<T>(a, cut, e.out, true);
    job.partial = Layout(a, workspace[i]).db;
    if (!add(a.dy, job)) return FERA_CUDA_ERROR;
  }
  for (int i = 0; i < members; ++i) {
    const Args& a = *member[i];
    const fera_experts& e = a.experts;
    const Layout l(a, workspace[i]);
    const Cut dy(e, e.out, all), x(e, e.in, all);
    if (a.da || a.dgate) {
      SumsJob<T> job = job_of<T>(a, x, e.in, a.da != nullptr);
      job.hidden = l.hidden;
      job.gate_sums = a.dgate ? l.gate_sums : nullptr;
      job.partial = a.da ? l.da : nullptr;
      if (!add(a.x, job)) return FERA_CUDA_ERROR;
    }
    reduce.member[i] = reduce_of(a, {l.da, l.db, l.gate_sums, x.slices, dy.slices, kSumsTokens});
    reduce_blocks += reduce.member[i].blocks();
  }
  if (blocks == 0) return FERA_OK;
  FERA_RETURN_IF_ERROR(launch(op, fused_sums<T, kRank>, blocks, kSumsThreads, kSumsBytes<kRank>, stream, maps, args));
  return launch(op, reduce_all<kRank>, reduce_blocks, kUpThreads, 0, stream, reduce);
}

}  // namespace

bool sums_take(const fera_experts& e) { return e.rows_per_gate >= kSumsTokens; }
size_t sums_workspace(const Args& a) { return Layout(a, nullptr).bytes; }
float* sums_hidden(const Args& a, void* workspace) { return a.da || a.dgate ? Layout(a, workspace).hidden : nullptr; }

fera_status launch_sums(const char* op, int members, const Args* const* member, void* const* workspace,
                        cudaStream_t stream) {
  const bool small = padded(member[0]->experts) == 16;
  if (member[0]->x.dtype == FERA_BF16)
    return small ? run<Bfloat, 16>(op, members, member, workspace, stream)
                 : run<Bfloat, 32>(op, members, member, workspace, stream);
  return small ? run<Half, 16>(op, members, member, workspace, stream)
               : run<Half, 32>(op, members, member, workspace, stream);
}

}  // namespace fera::cuda
