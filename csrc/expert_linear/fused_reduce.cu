// The reduction of a whole group's partial sums in one launch.
#include "expert_linear/fused_reduce.h"
#include "expert_linear/launch.h"

namespace fera::cuda {
namespace {

struct ReduceAllArgs {
  int members;
  ReduceArgs member[FERA_MAX_GROUP];
};
template <int kRank>
__global__ void __launch_bounds__(kUpThreads, 2) reduce_all(const __grid_constant__ ReduceAllArgs args) {
  wait_for_previous();
  int block = blockIdx.x, which = 0;
  while (block >= args.member[which].blocks()) block -= args.member[which++].blocks();
  reduce_block<kRank>(args.member[which], block);
}

}  // namespace

fera_status launch_reduce(const char* op, int members, int rank, const ReduceArgs* member, cudaStream_t stream) {
  ReduceAllArgs args{members, {}};
  int blocks = 0;
  for (int i = 0; i < members; ++i) {
    args.member[i] = member[i];
    blocks += member[i].blocks();
  }
  if (blocks == 0) return FERA_OK;
  return launch_kernel(op, rank == 16 ? reduce_all<16> : reduce_all<32>, static_cast<unsigned>(blocks), kUpThreads, 0,
                       1, true, stream, args);
}

}  // namespace fera::cuda
