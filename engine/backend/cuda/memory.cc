#include "engine/backend/cuda/memory.h"

#include <cstring>

namespace millrace::engine::cuda {
namespace {

std::string Megabytes(size_t bytes) { return std::to_string((bytes + 999999) / 1000000) + " MB"; }

}  // namespace

Result DeviceMemory::Allocate(size_t bytes, const char* what, DeviceMemory* memory) {
  size_t free_bytes = 0;
  size_t all_bytes = 0;
  MR_CUDA(cudaMemGetInfo(&free_bytes, &all_bytes));
  void* data = nullptr;
  if (bytes > free_bytes || cudaMalloc(&data, bytes) != cudaSuccess) {
    cudaGetLastError();  // an allocation that failed leaves nothing behind
    return Result("not enough GPU memory for " + std::string(what) + ": " + Megabytes(bytes) + " wanted, " +
                  Megabytes(free_bytes) + " of " + Megabytes(all_bytes) + " free");
  }
  *memory = DeviceMemory();
  memory->data_ = static_cast<std::byte*>(data);
  memory->bytes_ = bytes;
  return Result();
}

DeviceMemory::~DeviceMemory() { cudaFree(data_); }

Result PinnedMemory::Allocate(size_t bytes, const char* what, PinnedMemory* memory) {
  void* data = nullptr;
  if (cudaHostAlloc(&data, bytes, cudaHostAllocDefault) != cudaSuccess) {
    cudaGetLastError();
    return Result("cannot lock " + Megabytes(bytes) + " of host memory for " + what);
  }
  std::memset(data, 0, bytes);
  *memory = PinnedMemory();
  memory->data_ = static_cast<std::byte*>(data);
  memory->bytes_ = bytes;
  return Result();
}

PinnedMemory::~PinnedMemory() { cudaFreeHost(data_); }

}  // namespace millrace::engine::cuda
