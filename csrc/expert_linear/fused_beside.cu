// The fused product's kernels for Place::beside.
#include "expert_linear/fused_launch.cuh"

namespace fera::cuda {

template fera_status launch_products<Place::beside>(const char*, const Products&, bool, cudaStream_t);

}  // namespace fera::cuda
