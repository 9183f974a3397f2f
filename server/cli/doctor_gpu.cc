#include "server/cli/doctor_gpu.h"

#include <dlfcn.h>
#include <fmt/format.h>

namespace millrace::server {
namespace {

// What is used of NVML's C interface (nvml.h, stable since version 2 of these calls); its header comes with
// the CUDA toolkit, which the build may lack.
struct NvmlMemory {
  unsigned long long total;
  unsigned long long free;
  unsigned long long used;
};
using NvmlDevice = struct NvmlDeviceOpaque*;

template <typename Function>
bool Find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  return *function != nullptr;
}

void Ask(void* library, MachineFacts* facts) {
  int (*init)() = nullptr;
  int (*shutdown)() = nullptr;
  int (*driver_version)(char*, unsigned) = nullptr;
  int (*device_count)(unsigned*) = nullptr;
  int (*device_at)(unsigned, NvmlDevice*) = nullptr;
  int (*device_name)(NvmlDevice, char*, unsigned) = nullptr;
  int (*device_memory)(NvmlDevice, NvmlMemory*) = nullptr;
  int (*device_capability)(NvmlDevice, int*, int*) = nullptr;
  if (!Find(library, "nvmlInit_v2", &init) || !Find(library, "nvmlShutdown", &shutdown) ||
      !Find(library, "nvmlSystemGetDriverVersion", &driver_version) ||
      !Find(library, "nvmlDeviceGetCount_v2", &device_count) ||
      !Find(library, "nvmlDeviceGetHandleByIndex_v2", &device_at) ||
      !Find(library, "nvmlDeviceGetName", &device_name) ||
      !Find(library, "nvmlDeviceGetMemoryInfo", &device_memory) ||
      !Find(library, "nvmlDeviceGetCudaComputeCapability", &device_capability)) {
    facts->gpu_problem = "libnvidia-ml.so.1 lacks a function";
    return;
  }
  if (const int error = init(); error != 0) {
    facts->gpu_problem = fmt::format("the NVIDIA driver does not answer (NVML error {})", error);
    return;
  }
  char text[96] = {};
  if (driver_version(text, sizeof(text)) == 0) facts->gpu_driver = text;
  unsigned count = 0;
  device_count(&count);
  for (unsigned i = 0; i < count; ++i) {
    NvmlDevice device = nullptr;
    NvmlMemory memory{};
    Gpu gpu;
    char name[96] = {};
    if (device_at(i, &device) != 0 || device_name(device, name, sizeof(name)) != 0 ||
        device_memory(device, &memory) != 0 ||
        device_capability(device, &gpu.compute_major, &gpu.compute_minor) != 0) {
      facts->gpu_problem = fmt::format("GPU {} does not answer", i);
      continue;
    }
    gpu.name = name;
    gpu.memory_bytes = memory.total;
    gpu.memory_free_bytes = memory.free;
    facts->gpus.push_back(std::move(gpu));
  }
  shutdown();
}

}  // namespace

void ReadGpus(MachineFacts* facts) {
  void* const library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return;
  Ask(library, facts);
  dlclose(library);
}

}  // namespace millrace::server
