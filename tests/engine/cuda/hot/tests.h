#pragma once

namespace millrace::test {

void TestGroupedGemm();
void TestAttention();

}  // namespace millrace::test
