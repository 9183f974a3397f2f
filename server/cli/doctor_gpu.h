#pragma once
// GPUs as the NVIDIA driver's management library (NVML) tells them. It is opened at run time: a process
// without a driver has no GPUs.

#include "server/cli/doctor_facts.h"

namespace millrace::server {

// Fills gpu_driver, gpus and gpu_problem.
void ReadGpus(MachineFacts* facts);

}  // namespace millrace::server
