#pragma once
// Each runs its checks and counts them in support.h.

namespace millrace::test {

void TestStepKernels();
void TestFewRows();
void TestSampling();
void TestStepRunner();
void TestDeviceError();

}  // namespace millrace::test
