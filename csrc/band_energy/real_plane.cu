#include <algorithm>
#include <climits>
#include <iterator>

#include "band_energy/asked.h"
#include "band_energy/real_plane.cuh"
#include "band_energy/real_plane.h"

namespace fera::cuda {
namespace {

// Of every kernel that is built: height, width, rows and complex columns of a patch, threads of a block, blocks that a
// multiprocessor has room for; and how many planes a call has at least that takes it without being asked, on 132
// multiprocessors (README). Of several the last that has enough.
#define FERA_REAL_SIZES(X)      \
  X(128, 128, 8, 4, 256, 1, 32) \
  X(128, 128, 8, 4, 256, 2, 113)

constexpr int kPortableCluster = 8;  // blocks that a cluster may have anywhere

struct Kernel {
  int h, w, threads, blocks, least;
  size_t bytes, bytes_together;
  void (*energies)(Source, const float*, int, Finish<float>, double*, bool);
};

template <class F, int Threads, int Blocks>
constexpr Kernel kernel(int height, int width, int least) {
  return {height,
          width,
          Threads,
          Blocks,
          least,
          real_bytes<F>(false),
          real_bytes<F>(true),
          real_energies<F, Threads, Blocks>};
}

const Kernel kKernels[] = {
#define FERA_KERNEL(H, W, HB, WB, T, B, LEAST) kernel<RealSize<H, W, HB, WB>, T, B>(H, W, LEAST),
    FERA_REAL_SIZES(FERA_KERNEL)
#undef FERA_KERNEL
};

// Blocks, and clusters of the largest size, that run side by side; 0 where the kernel does not run.
struct Room {
  int planes, clusters;
};

// Asked once a device and kernel; also raises the kernel's limits there.
Room room_of(const Kernel& k) {
  static Asked<std::size(kKernels)> asked;
  const Answer found = asked(&k - kKernels, [&](int device, Answer* answer) {
    int cooperative = 0, launches = 0, multiprocessors = 0, here = 0, clusters = 0;
    cudaFuncAttributes attributes{};
    bool ok = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess &&
              cudaDeviceGetAttribute(&launches, cudaDevAttrClusterLaunch, device) == cudaSuccess &&
              cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device) == cudaSuccess &&
              cooperative != 0 && launches != 0 && cudaFuncGetAttributes(&attributes, k.energies) == cudaSuccess &&
              attributes.ptxVersion >= 90 &&
              cudaFuncSetAttribute(k.energies, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(k.bytes_together)) == cudaSuccess &&
              cudaFuncSetAttribute(k.energies, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
              cudaOccupancyMaxActiveBlocksPerMultiprocessor(&here, k.energies, k.threads, k.bytes) == cudaSuccess;
    cudaLaunchAttribute attribute = cluster_of(kPlaneCluster);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(kPlaneCluster);
    config.blockDim = dim3(k.threads);
    config.dynamicSmemBytes = k.bytes_together;
    config.attrs = &attribute;
    config.numAttrs = 1;
    ok = ok && cudaOccupancyMaxActiveClusters(&clusters, k.energies, &config) == cudaSuccess;
    *answer = {here * multiprocessors, clusters};
    return ok;
  });
  return {found.first, found.second};
}

// What a call takes by itself, or, where there is none, any that it could be asked to take; within the wish.
const Kernel* find(const Source& s, const RealWish& wish, bool* enough) {
  const Kernel* found = nullptr;
  int most = -1;
  for (const Kernel& k : kKernels) {
    if (k.h != s.h || k.w != s.w || (wish.threads != 0 && k.threads != wish.threads) ||
        (wish.blocks != 0 && k.blocks != wish.blocks))
      continue;
    const int here = s.n * s.p >= k.least ? k.least : 0;
    if (here <= most) continue;
    found = &k;
    most = here;
  }
  *enough = most > 0;
  return found;
}

}  // namespace

bool real_takes(const Source& s, const fera_filters& f, bool wished, const RealWish& wish) {
  if (f.blurs != 0 || s.signals != 1 || s.dtype == FERA_F64 || s.n <= 0 || s.p <= 0 || s.whole.stride_w != 1)
    return false;
  bool enough = false;
  const Kernel* const k = find(s, wish, &enough);
  return k != nullptr && (wished || enough) && s.n * s.p <= INT_MAX && room_of(*k).planes > 0;
}

// (N, P, K)
size_t real_workspace(const Source& s, const fera_filters& f) {
  return align256(sizeof(double) * std::max<int64_t>(s.n, 0) * s.p * f.bands);
}

fera_status real_energies_launch(const char* op, const Source& s, const fera_filters& f, const Finish<float>& finish,
                                 const RealWish& wish, const fera_context* context) {
  bool enough;
  const Kernel& k = *find(s, wish, &enough);
  const Room room = room_of(k);
  const int64_t planes = s.n * s.p;
  // Larger clusters only with a multiprocessor a block: two of them meet later than at the grid's barrier.
  const bool fits = s.p <= kPortableCluster ? planes <= room.planes * 7 / 8
                                            : k.blocks == 1 && s.p <= kPlaneCluster && s.n <= room.clusters;
  const bool together = fits && wish.launches != 2;
  // As many planes a block everywhere, so that they are of one sample where they can be.
  const int64_t each = ceil_div<int64_t>(planes, std::min<int64_t>(planes, room.planes));
  cudaLaunchAttribute attribute = cluster_of(s.p);
  if (!together) {
    attribute = {};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(together ? planes : ceil_div(planes, each)));
  config.blockDim = dim3(k.threads);
  config.dynamicSmemBytes = together ? k.bytes_together : k.bytes;
  config.stream = stream_of(context);
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, k.energies, s, masks_of(f), static_cast<int>(f.bands), finish,
                     static_cast<double*>(context->workspace), together);
  return launch_status(op);
}

}  // namespace fera::cuda
