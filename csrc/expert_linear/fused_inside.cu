// The fused product's kernels for Place::inside.
#include "expert_linear/fused_launch.cuh"

namespace fera::cuda {

template fera_status launch_products<Place::inside>(const char*, const Products&, bool, cudaStream_t);

}  // namespace fera::cuda
