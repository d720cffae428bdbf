// Host side of fused_turns.cuh: the width of tiles, the launch.
#include "expert_linear/fused_launch.cuh"
#include "expert_linear/fused_turns.cuh"

namespace fera::cuda {
namespace {

template <class T, int kN, int kCluster, int kInside>
fera_status run(const char* op, const Products& p, bool follows, cudaStream_t stream) {
  FusedMaps maps;
  FusedShape<T> shape{};
  FERA_RETURN_IF_ERROR((prepare<kN, false, kCluster, Place::inside, kInside>(op, p, &maps, &shape)));
  const int blocks = std::min(hopper() / kCluster, shape.plan.tiles) * kCluster;
  return launch_kernel(op, fused_turns<T, kN, kCluster, kInside>, static_cast<unsigned>(blocks), kFusedThreads,
                       TurnsSize<kN, kInside>::bytes, kCluster, follows, stream, maps, shape);
}

// The width whose waves of tiles multiply least; those of h for R > 16 leave registers for 128 alone.
int columns_of_tile(const Products& p, int cluster) {
  if (p.member[0].rank > 16) return 128;
  const char* wish = std::getenv("FERA_EXPERT_TILE");  // for tests and timings
  if (wish != nullptr && (std::atoi(wish) == 128 || std::atoi(wish) == 160)) return std::atoi(wish);
  const auto work = [&](int64_t width) {
    int64_t tiles = 0;
    for (int i = 0; i < p.members; ++i)
      tiles += ceil_div(p.member[i].rows, int64_t{cluster} * kFusedRows) * ceil_div(p.member[i].columns, width);
    return ceil_div(tiles, int64_t{hopper() / cluster}) * (width + 16);
  };
  return work(160) <= work(128) ? 160 : 128;
}

template <class T, int kCluster>
fera_status launch_type(const char* op, const Products& p, bool follows, cudaStream_t stream) {
  if (p.member[0].rank > 16) return run<T, 128, kCluster, 32>(op, p, follows, stream);
  return columns_of_tile(p, kCluster) == 160 ? run<T, 160, kCluster, 16>(op, p, follows, stream)
                                             : run<T, 128, kCluster, 16>(op, p, follows, stream);
}
template <class T>
fera_status launch_cluster(const char* op, const Products& p, bool follows, cudaStream_t stream) {
  // Where the loop over k is short, two blocks that wait for each other cost more than the loads they share.
  return p.member[0].depth <= 384 ? launch_type<T, 1>(op, p, follows, stream)
                                  : launch_type<T, 2>(op, p, follows, stream);
}

}  // namespace

fera_status launch_turns(const char* op, const Products& p, bool follows, cudaStream_t stream) {
  return p.member[0].x.dtype == FERA_BF16 ? launch_cluster<Bfloat>(op, p, follows, stream)
                                          : launch_cluster<Half>(op, p, follows, stream);
}

}  // namespace fera::cuda
